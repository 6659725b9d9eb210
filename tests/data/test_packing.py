"""Packing: nothing lost, nothing over capacity, tight, deterministic, and positions that restart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import IGNORE_INDEX, Example, best_fit, collate, pack
from halfbyte.errors import HalfbyteError


def example(length: int, start: int = 0) -> Example:
    ids = torch.arange(start, start + length, dtype=torch.int32)
    labels = ids.clone()
    labels[0] = IGNORE_INDEX
    return Example(ids, labels, f"row {start}")


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 80))
def test_every_example_has_a_place_and_no_row_is_over_full(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == best_fit(lengths, capacity)
    # No two rows could have been one: that is what fitting, of any kind, promises.
    loads = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_an_example_goes_where_it_leaves_the_least_room() -> None:
    # 7 and 6 open rows with 3 and 4 left; the 3 belongs with the 7, though the row of 6 has room for it too.
    assert best_fit([6, 7, 3], 10) == [[0], [1, 2]]


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(HalfbyteError, match="11 tokens"):
        best_fit([3, 11], 10)


def test_positions_restart_and_first_labels_are_not_learned() -> None:
    (row,) = pack([example(3), example(2, 10)], 8)
    assert row.input_ids.tolist() == [0, 1, 2, 10, 11]
    assert row.position_ids is not None
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.labels.tolist() == [IGNORE_INDEX, 1, 2, IGNORE_INDEX, 11]


def test_padding_of_a_packed_row_is_a_text_of_its_own() -> None:
    batch = collate(pack([example(6), example(3), example(2)], 6), pad_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["labels"][1, -1] == IGNORE_INDEX
