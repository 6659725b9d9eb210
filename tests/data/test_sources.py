"""Where rows come from: files, directories and splits, slices, the hub's layout, columns by other names, mixes."""

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Row, Source, read_rows, read_sources, source_files
from halfbyte.data.hub import PAPER_DATASETS, is_hub_id, read_hub
from halfbyte.data.sources import parse_split
from halfbyte.errors import HalfbyteError


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(rows: object) -> list[str]:
    return [row.pieces[0].text for row in rows]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return write(tmp_path / "ten.jsonl", *(str(number) for number in range(10)))


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        (None, "0123456789"),
        ("train", "0123456789"),
        ("train[:5]", "01234"),
        ("[:5]", "01234"),
        ("train[7:]", "789"),
        ("train[2:4]", "23"),
        ("train[:]", "0123456789"),
        ("train[-2:]", "89"),
        ("train[:-8]", "01"),
        ("train[:20%]", "01"),
        ("train[50%:70%]", "56"),
        ("train[90%:]", "9"),
        ("train[-10%:]", "9"),
        ("train[8:5000]", "89"),
    ],
)
def test_a_slice_is_pythons(ten, split, wanted):
    assert "".join(texts_of(read_rows(ten, split=split))) == wanted


@given(start=st.none() | st.integers(-12, 12), stop=st.none() | st.integers(-12, 12))
def test_any_slice_is_pythons(tmp_path_factory, start, stop):
    path = write(tmp_path_factory.getbasetemp() / "ten.jsonl", *(str(number) for number in range(10)))
    split = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    wanted = [str(number) for number in list(range(10))[start:stop]]
    if wanted:
        assert texts_of(read_rows(path, split=split)) == wanted
    else:
        with pytest.raises(HalfbyteError, match=r"ten\.jsonl train\[.*there are no rows in it"):
            list(read_rows(path, split=split))


@pytest.mark.parametrize(
    "split", ["train[5]", "train[:5", "train[a:]", "train[1:2:3]", "train 1", "train[1.5:]", "train[:101%]"]
)
def test_a_split_that_is_none_is_told_before_a_row_is_read(ten, split):
    with pytest.raises(HalfbyteError, match=r"^split 'train"):
        read_rows(ten, split=split)


def test_a_file_has_one_split(ten):
    with pytest.raises(HalfbyteError, match=r"ten\.jsonl: one file has one split, train; 'test' is not in it"):
        read_rows(ten, split="test")


LAYOUTS = {
    "a folder of files": (["b.jsonl", "a.jsonl"], {"train": ["a.jsonl", "b.jsonl"]}),
    "a file for each split": (
        ["train.jsonl", "test.jsonl", "dev.jsonl"],
        {"train": ["train.jsonl"], "test": ["test.jsonl"], "validation": ["dev.jsonl"]},
    ),
    "shards": (
        ["data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
        {"train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]},
    ),
    "splits with names of their own": (
        ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
        {"train_sft": ["data/train_sft-00000-of-00001.jsonl"], "test": ["data/test_sft-00000-of-00001.jsonl"]},
    ),
    "a folder for each split": (
        ["training/a.jsonl", "testing/a.jsonl", "train/latest.jsonl"],
        {"train": ["train/latest.jsonl", "training/a.jsonl"], "test": ["testing/a.jsonl"]},
    ),
    "what is no data": (
        ["a.jsonl", "README.txt", "LICENSE.txt", ".hidden.jsonl", ".git/b.jsonl", "_old/c.jsonl", "state.json", "x.py"],
        {"train": ["a.jsonl"]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_of_a_split_in_their_order(tmp_path, name):
    files, splits = LAYOUTS[name]
    for file in files:
        write(tmp_path / file, file)
    for split, wanted in splits.items():
        assert source_files(Source(str(tmp_path), split=split)) == [tmp_path / file for file in wanted]
        assert texts_of(read_rows(tmp_path, split=split)) == wanted
    assert texts_of(read_rows(tmp_path, split="train[:1]" if "train" in splits else "train_sft[:1]"))


def test_a_directory_without_that_split_or_without_data(tmp_path):
    with pytest.raises(HalfbyteError, match="there is no data file in this directory"):
        read_rows(tmp_path)
    write(tmp_path / "test.jsonl", "a")
    with pytest.raises(HalfbyteError, match="there is no split 'train' in this directory, only test"):
        read_rows(tmp_path)


def test_a_directory_of_several_kinds_of_file(tmp_path):
    write(tmp_path / "a.jsonl", "one")
    (tmp_path / "b.csv").write_text("text\ntwo\n")
    (tmp_path / "c.txt").write_text("three\n")
    rows = list(read_rows(tmp_path))
    assert texts_of(rows) == ["one", "two", "three"]
    assert [row.source for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.csv:2", f"{tmp_path}/c.txt:1"]


def test_what_datasets_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{"text": str(number)} for number in range(5)])
    train.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert texts_of(read_rows(tmp_path / "one")) == list("01234")
    both = datasets.DatasetDict({"train": train, "test": train.select([4])})
    both.save_to_disk(str(tmp_path / "two"))
    assert texts_of(read_rows(tmp_path / "two")) == list("01234")
    assert texts_of(read_rows(tmp_path / "two", split="test")) == ["4"]


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("tatsu-lab/alpaca", True),
        ("HuggingFaceH4/ultrachat_200k:default", True),
        ("laion/OIG:unified_chip2.jsonl", True),
        ("oasst1", True),
        ("data/rows.jsonl", False),
        ("data/rows.parquet", False),
        ("rows", False),
        ("./data/rows", False),
        ("/data/rows", False),
        ("a/b/c", False),
        ("../rows", False),
    ],
)
def test_what_may_be_a_hub_id(path, is_one):
    assert is_hub_id(path) is is_one


def test_the_papers_names_are_hub_ids():
    assert all(is_hub_id(path) for path in PAPER_DATASETS.values())


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "repository"


def values(records: object) -> list[tuple[object, str]]:
    return [(record.value, record.source.rpartition(" (")[2]) for record in records]


def test_a_data_set_in_the_hubs_layout_through_datasets(hub_cache):
    """A directory stands in for the repository: from there on `datasets` goes the way that it goes with an id."""
    write(hub_cache / "data" / "train-00000-of-00002.jsonl", "one", "two")
    write(hub_cache / "data" / "train-00001-of-00002.jsonl", "three")
    write(hub_cache / "data" / "test-00000-of-00001.jsonl", "four")
    assert values(read_hub(str(hub_cache), "train")) == [
        ({"text": "one"}, "row 1)"),
        ({"text": "two"}, "row 2)"),
        ({"text": "three"}, "row 3)"),
    ]
    assert values(read_hub(str(hub_cache), "test")) == [({"text": "four"}, "row 1)")]
    assert values(read_hub(f"{hub_cache}:data/test-00000-of-00001.jsonl", "train")) == [({"text": "four"}, "row 1)")]
    with pytest.raises(HalfbyteError, match=r"as a data set of the hub it cannot be loaded: .*validation"):
        list(read_hub(str(hub_cache), "validation"))


def test_a_configuration_of_a_data_set_in_the_hubs_layout(hub_cache):
    write(hub_cache / "german" / "rows.jsonl", "eins")
    write(hub_cache / "english" / "rows.jsonl", "one")
    (hub_cache / "README.md").write_text(
        "---\nconfigs:\n- config_name: de\n  data_files: german/*.jsonl\n"
        "- config_name: en\n  data_files: english/*.jsonl\n---\n"
    )
    assert values(read_hub(f"{hub_cache}:de", "train")) == [({"text": "eins"}, "row 1)")]
    assert values(read_hub(f"{hub_cache}:en", "train")) == [({"text": "one"}, "row 1)")]
    with pytest.raises(HalfbyteError, match=r"as a data set of the hub it cannot be loaded: .*de"):
        list(read_hub(str(hub_cache), "train"))


def test_an_id_without_a_network(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    rows = read_rows("nobody/nothing")
    with pytest.raises(HalfbyteError, match=r"^nobody/nothing: there is no such file or directory, and as a data set"):
        next(rows)


def test_columns_that_go_by_other_names(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"input": "what?", "response": "that", "output": "no", "context": None}) + "\n")
    columns = {"instruction": "input", "output": "response", "input": "context"}
    (row,) = read_rows(path, columns=columns)
    assert tuple(row.alpaca) == ("what?", "", "that")
    (row,) = read_rows(path, "input-output", columns={"input": "output", "output": "input"})
    assert [piece.text for piece in row.pieces] == ["no", "what?"]
    with pytest.raises(
        HalfbyteError, match=r"rows\.jsonl:1: there is no column 'answer', which columns names; there is"
    ):
        list(read_rows(path, columns={"text": "answer"}))


def mixed(folder: Path, **sets: tuple[int, float | None]) -> list[Source]:
    """{name: (rows, weight)}; the texts are name0, name1, ..."""
    made = []
    for name, (rows, weight) in sets.items():
        path = write(folder / f"{name}.jsonl", *(f"{name}{number}" for number in range(rows)))
        made.append(Source(str(path), weight))
    return made


def test_sets_without_weights_follow_one_another(tmp_path):
    assert texts_of(read_sources(mixed(tmp_path, a=(2, None), b=(1, None)))) == ["a0", "a1", "b0"]


def test_a_mix_is_by_weight_at_every_length(tmp_path):
    rows = texts_of(islice(read_sources(mixed(tmp_path, a=(300, 3), b=(100, 1))), 400))
    for length in range(4, 401, 4):
        assert sum(row.startswith("a") for row in rows[:length]) == length * 3 // 4
    assert sorted(rows) == sorted({*rows})


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        ({"a": (2, 1), "b": (2, 1)}, "a0 b0 a1 b1"),
        ({"a": (4, 1), "b": (2, 1)}, "a0 b0 a1 b1 a2 b0 a3"),
        ({"a": (1, 1), "b": (4, 2)}, "b0 a0 b1 b2 a0 b3"),
        ({"a": (2, 0.25)}, "a0 a1"),
    ],
)
def test_a_mix_ends_when_every_set_was_read_to_its_end(tmp_path, sets, wanted):
    assert " ".join(texts_of(read_sources(mixed(tmp_path, **sets)))) == wanted


def test_a_bad_row_of_a_mix_is_told_once(tmp_path):
    sources = mixed(tmp_path, a=(2, 1), b=(6, 1))
    with open(sources[0].path, "a") as file:
        file.write("{}\n")
    told: list[HalfbyteError] = []
    rows = texts_of(read_sources(sources, on_bad_row=told.append))
    assert rows == ["a0", "b0", "a1", "b1", "a0", "b2", "a1", "b3", "a0", "b4", "a1", "b5"]
    assert len(told) == 1


def test_each_set_has_its_own_format_split_and_columns(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\none,1\ntwo,2\n")
    write(tmp_path / "b.jsonl", "x", "y")
    sources = [
        Source(str(tmp_path / "a.csv"), None, "train[1:]", "input-output", {"input": "q", "output": "a"}),
        Source(str(tmp_path / "b.jsonl")),
    ]
    rows: list[Row] = list(read_sources(sources))
    assert [[piece.text for piece in row.pieces] for row in rows] == [["two", "2"], ["x"], ["y"]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1, None), "1 of 2 data sets have a weight"),
        ((0, 1), "above 0"),
        ((float("nan"), 1), "above 0"),
        ((-1, 1), "above 0"),
    ],
)
def test_weights_that_say_nothing(tmp_path, weights, message):
    first, second = weights
    with pytest.raises(HalfbyteError, match=message):
        read_sources(mixed(tmp_path, a=(1, first), b=(1, second)))
    with pytest.raises(HalfbyteError, match="an empty list"):
        read_sources([])


def test_a_split_is_read_into_its_parts():
    assert parse_split(None) == ("train", None, None)
    assert parse_split("test[10%:-5]") == ("test", "10%", "-5")
