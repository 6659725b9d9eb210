"""A store gives back what was put in, and of a damaged one exactly the chunks before the damage."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data import IGNORE_INDEX, Example
from halfbyte.data import token_store as store_module
from halfbyte.data.token_store import CHUNKS_FILE, DATA_FILES, StoredExamples, StoreWriter, chunk_of, read_chunks


def example(ids: list[int], learned: list[bool], source: str = "rows.jsonl:1") -> Example:
    input_ids = torch.tensor(ids, dtype=torch.int32)
    return Example(input_ids, torch.where(torch.tensor(learned), input_ids, IGNORE_INDEX), source)


def examples_of(number: int, first: int = 0) -> list[Example]:
    """Of different lengths, some of them empty of anything learned, with sources that are not ASCII."""
    return [
        example([first + i] * (1 + i % 7), [j % 3 == i % 3 for j in range(1 + i % 7)], f"Sätze.jsonl:{first + i}")
        for i in range(number)
    ]


def write(directory: Path, *chunks: list[Example]) -> None:
    writer = StoreWriter(directory)
    for chunk in chunks:
        writer.append(chunk_of(len(chunk), chunk, {"rows": len(chunk)}))
    writer.close()


def assert_same(got: list[Example], want: list[Example]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.input_ids.dtype == a.labels.dtype == torch.int32
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.labels.tolist() == b.labels.tolist()
        assert (a.source, a.position_ids) == (b.source, None)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first, second = examples_of(5), examples_of(2000, 100)
    write(tmp_path / "store", first, [], second)
    records, complete = read_chunks(tmp_path / "store")
    assert complete
    assert [record.rows for record in records] == [5, 0, 2000]
    assert [record.statistics for record in records] == [{"rows": 5}, {"rows": 0}, {"rows": 2000}]
    stored = StoredExamples(tmp_path / "store")
    assert_same(list(stored), first + second)  # more than come between two releases of the pages
    assert_same([stored[-1], *stored[3:7]], [second[-1], *(first + second)[3:7]])
    assert stored.lengths.tolist() == [len(e.input_ids) for e in first + second]
    with pytest.raises(IndexError, match="2005 examples"):
        stored[2005]


def test_the_format_is_what_its_page_says(tmp_path: Path) -> None:
    write(tmp_path / "store", [example([7, 65536], [False, True], "a:1")], [example([9], [False], "é:2")])
    contents = [(tmp_path / "store" / name).read_bytes() for name in DATA_FILES]
    assert contents == [
        b"\x07\0\0\0\0\0\x01\0\x09\0\0\0",
        b"\0\x01\0",
        np.array([2, 3, 3, 7], "<i8").tobytes(),
        "a:1é:2".encode(),
    ]


def test_an_empty_store_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "store")
    assert len(StoredExamples(tmp_path / "store")) == 0
    assert read_chunks(tmp_path / "store") == ([], True)


def test_nobody_can_write_to_what_is_stored(tmp_path: Path) -> None:
    write(tmp_path / "store", examples_of(3))
    stored = StoredExamples(tmp_path / "store")
    stored[2].input_ids.fill_(-1)
    stored[2].labels.fill_(-1)
    assert_same(list(stored), examples_of(3))


def test_labels_that_a_store_could_not_give_back_are_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        chunk_of(1, [Example(torch.tensor([1, 2]), torch.tensor([IGNORE_INDEX, 3]))], {})


def test_pages_are_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "store", examples_of(1100))
    released: list[object] = []

    def release(file: object) -> None:
        released.append(file)

    monkeypatch.setattr(store_module._Map, "release", release)
    list(StoredExamples(tmp_path / "store"))
    assert len(released) == 4 * 2


@pytest.fixture(scope="module")
def three_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stores") / "store"
    write(directory, examples_of(20), examples_of(30, 50), examples_of(10, 100))
    return directory


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from((*DATA_FILES, CHUNKS_FILE)), where=st.floats(0, 0.999), damage=st.integers(-2, 255))
def test_damage_anywhere_is_found_and_mended(
    three_chunks: Path, tmp_path: Path, name: str, where: float, damage: int
) -> None:
    """A file cut off (-2), longer (-1) or with a byte changed: whole chunks before it stay, and are gone on from."""
    directory = tmp_path / "store"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(three_chunks, directory)
    data = bytearray((directory / name).read_bytes())
    at = int(where * len(data))
    if damage == -2:
        del data[at:]
    elif damage == -1:
        data += b"\0"
    elif data[at] == damage:
        return
    else:
        data[at] = damage
    (directory / name).write_bytes(data)
    records, complete = read_chunks(directory)
    assert not complete
    assert records == read_chunks(three_chunks)[0][: len(records)]
    assert len(records) < 3 or damage == -1
    rest = [examples_of(20), examples_of(30, 50), examples_of(10, 100)][len(records) :]
    write(directory, *rest)
    for file in (*DATA_FILES, CHUNKS_FILE):
        assert (directory / file).read_bytes() == (three_chunks / file).read_bytes()
    assert read_chunks(directory)[1]
