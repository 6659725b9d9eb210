"""Rows longer than max_length: what is kept, what is counted, and that each way loses only what it says."""

import pytest
import torch
from chat_layouts import chat
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Piece, Row, encode_rows
from halfbyte.data.truncation import TRUNCATIONS, Labelled, split
from halfbyte.errors import HalfbyteError

LONG = "hello there " * 20
ROWS = [Row(chat("hello", "four"), "r:1"), Row(chat(LONG, "four five"), "r:2"), Row(chat("hello", LONG), "r:3")]


def test_long_rows_are_left_out_and_counted(byte_level):
    tokenizer = byte_level()
    whole, _ = encode_rows(tokenizer, ROWS, max_length=500)
    examples, statistics = encode_rows(tokenizer, ROWS, max_length=30, truncation="drop")
    assert [example.source for example in examples] == ["r:1"]
    assert torch.equal(examples[0].input_ids, whole[0].input_ids)
    assert (statistics.rows, statistics.examples, statistics.dropped, statistics.truncated) == (3, 1, 2, 0)
    assert statistics.dropped_tokens == sum(len(example.input_ids) for example in whole[1:])
    assert statistics.longest == max(len(example.input_ids) for example in whole)
    assert "2 examples of more than max_length tokens left out" in statistics.warnings()[0]


def test_a_long_row_stops_the_run_where_that_is_asked_for(byte_level):
    with pytest.raises(HalfbyteError, match=r"^r:2: this row has \d+ tokens and max_length is 30"):
        encode_rows(byte_level(), ROWS, max_length=30, truncation="error")
    assert len(encode_rows(byte_level(), ROWS, max_length=500, truncation="error")[0]) == 3
    with pytest.raises(HalfbyteError, match="truncation 'middle' is not known: use keep_end, drop, split or error"):
        encode_rows(byte_level(), ROWS, max_length=30, truncation="middle")


def test_a_long_row_in_windows_learns_every_token_once(byte_level):
    tokenizer = byte_level()
    whole, unsplit = encode_rows(tokenizer, ROWS, max_length=500)
    examples, statistics = encode_rows(tokenizer, ROWS, max_length=30, truncation="split")
    assert statistics.supervised_tokens == unsplit.supervised_tokens
    # Of the long question with a short answer, one window has something to learn: that one is kept.
    assert (statistics.windowed, statistics.truncated) == (1, 1)
    assert statistics.windows == len(examples) - 2
    learned = [label for example in examples for label in example.labels.tolist() if label != -100]
    assert learned == [label for example in whole for label in example.labels.tolist() if label != -100]
    assert f"1 example of more than max_length tokens cut into {statistics.windows}" in statistics.warnings()[1]
    text = Row([], "r:4", pieces=(Piece(LONG, True),))
    examples, statistics = encode_rows(tokenizer, [text], max_length=16, truncation="split")
    (all_of_it,), _ = encode_rows(tokenizer, [text], max_length=500)
    assert statistics.supervised_tokens == all_of_it.supervised_tokens
    assert examples[-1].labels[-1] == tokenizer.eos_token_id


cases = st.integers(3, 9).flatmap(
    lambda most: st.tuples(st.just(most), st.lists(st.booleans(), min_size=most + 1, max_size=60), st.booleans())
)


@given(cases, st.sampled_from(sorted(TRUNCATIONS)))
def test_no_way_makes_an_example_too_long_or_without_anything_to_learn(case, way):
    max_length, learned, has_bos = case
    learned[-1] = True
    whole = Labelled(list(range(len(learned))), [False, *learned[1:]])
    for part in TRUNCATIONS[way](whole, max_length, 0 if has_bos else None):
        assert 2 <= len(part.ids) == len(part.learned) <= max_length
        assert part.supervised > 0
        assert not has_bos or part.ids[0] == 0
        assert 0 not in part.ids[1:]
        rest = part.ids[1:] if has_bos else part.ids
        assert rest == list(range(rest[0], rest[0] + len(rest)))  # in one piece
        if way == "keep_end":
            assert part.ids[-1] == whole.ids[-1]


@given(cases)
def test_windows_are_even_and_none_learns_what_another_does(case):
    max_length, learned, has_bos = case
    whole = Labelled(list(range(len(learned))), [False, *[True] * (len(learned) - 1)])
    windows = split(whole, max_length, 0 if has_bos else None)
    seen = [token for window in windows for token, is_learned in zip(*window, strict=True) if is_learned]
    assert seen == whole.ids[1:]
    sizes = [sum(window.learned) for window in windows]
    assert max(sizes) - min(sizes) <= 1


def test_a_window_needs_room_for_what_it_begins_with():
    with pytest.raises(HalfbyteError, match="max_length is 2"):
        split(Labelled([0, 1, 2], [False, True, True]), 2, 0)
    assert [window.ids for window in split(Labelled([9, 1, 2], [False, True, True]), 2, 0)] == [[9, 1], [1, 2]]
