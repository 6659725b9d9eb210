"""Where the records of a data set are: a file, a directory of files or a hub id, and which split and slice of it.

A directory's files are told apart by their names, as the hub does it: `train-00000-of-00002.parquet`,
`data/test.jsonl`, `validation/rows.csv`. What names no split is for training.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from halfbyte.data.files import KINDS, is_data_file, read_file
from halfbyte.data.hub import is_hub_id, read_hub
from halfbyte.data.records import Record, bad_record
from halfbyte.data.rows import Source
from halfbyte.errors import HalfbyteError

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "heldout"),
}
_SLICED = re.compile(r"([\w.-]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Files that stand beside data and are none.
_ABOUT = {"readme", "license", "licence", "notice", "requirements", "changelog", "citation"}
_STATE = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class Split(NamedTuple):
    """ "test[10%:-5]" is Split("test", "10%", "-5")."""

    name: str
    start: str | None
    stop: str | None

    def within(self, rows: Callable[[], int]) -> tuple[int, int | None]:
        """The numbers of the first row and of the one after the last, of so many; `rows` is asked where it matters."""
        bounds = [bound for bound in (self.start, self.stop) if bound and (bound.startswith("-") or "%" in bound)]
        total = rows() if bounds else 0

        def number(bound: str) -> int:
            count = int(bound.rstrip("%"))
            count = round(count * total / 100) if bound.endswith("%") else count
            return max(0, total + count) if bound.startswith("-") else count

        return number(self.start) if self.start else 0, number(self.stop) if self.stop else None


def parse_split(text: str | None) -> Split:
    """Raises HalfbyteError for what is not `name`, `name[start:stop]` or `[start:stop]`."""
    match = _SLICED.fullmatch(text or "train")
    if match is None:
        raise HalfbyteError(f"split '{text}' is not known: write train, train[:5000] or train[10%:20%]")
    name, start, stop = match.groups()
    if any(bound and bound.endswith("%") and abs(int(bound[:-1])) > 100 for bound in (start, stop)):
        raise HalfbyteError(f"split '{text}' asks for more than 100 %")
    return Split(name or "train", start, stop)


def open_source(source: Source) -> Callable[[], Iterator[Record]]:
    """What reads the source's records from the first on, each time it is called.

    Raises HalfbyteError where there is no such source or no such split of it, before a row is read.
    """
    split = parse_split(source.split)
    if is_local(source.path):
        files = source_files(source)

        def read_all() -> Iterator[Record]:
            for file in files:
                yield from read_file(file)
    else:

        def read_all() -> Iterator[Record]:
            return read_hub(source.path, split.name)

    def read() -> Iterator[Record]:
        first, stop = split.within(lambda: sum(1 for _ in read_all()))
        records = islice(read_all(), first, None if stop is None else max(first, stop))
        return _with_columns(records, source.columns) if source.columns else records

    return read


def is_local(path: str) -> bool:
    """Whether it is read from this machine's files. Raises HalfbyteError where it is there neither nor on the hub."""
    try:
        if Path(path).exists():
            return True
    except OSError as error:  # a name that no file can have, a directory that may not be looked into
        raise HalfbyteError(f"{path}: cannot be read: {error.strerror}") from None
    if is_hub_id(path):
        return False
    raise HalfbyteError(f"{path}: there is no such file or directory")


def source_files(source: Source) -> list[Path]:
    """The files of a local source, in the order they are read; those of the split it asks for."""
    root, split = Path(source.path), parse_split(source.split).name
    if not root.is_dir():
        if split != "train":
            raise HalfbyteError(f"{root}: one file has one split, train; '{split}' is not in it")
        read_file(root)  # whether its name is one of a data file
        return [root]
    files = _data_files(root)
    if not files:
        raise HalfbyteError(f"{root}: there is no data file in this directory: {KINDS}")
    chosen = [file for file in files if split in (_split_of(file, root), *_components(file, root))]
    if not chosen:
        there = ", ".join(sorted({_split_of(file, root) for file in files}))
        raise HalfbyteError(f"{root}: there is no split '{split}' in this directory, only {there}")
    return chosen


def _data_files(root: Path) -> list[Path]:
    try:
        found = sorted(path for path in root.rglob("*") if path.is_file())
    except OSError as error:
        raise HalfbyteError(f"{root}: cannot be read: {error.strerror}") from None
    return [path for path in found if is_data_file(path) and not _is_beside_data(path, root)]


def _is_beside_data(path: Path, root: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(root).parts)
    cache = path.suffix == ".arrow" and path.name.startswith("cache-")  # what `datasets` leaves beside a saved set
    return hidden or cache or path.name in _STATE or path.name.split(".")[0].lower() in _ABOUT


def _components(path: Path, root: Path) -> list[str]:
    """data/train_sft-00000-of-00001.parquet: data, train_sft."""
    *folders, name = path.relative_to(root).parts
    return [*folders, _SHARD.sub("", name.split(".")[0])]


def _split_of(path: Path, root: Path) -> str:
    words = re.split(r"[^a-z0-9]+", "/".join(_components(path, root)).lower())
    named = (split for word in words for split, names in _SPLIT_WORDS.items() if word in names)
    return next(named, "train")


def _with_columns(records: Iterator[Record], columns: Mapping[str, str]) -> Iterator[Record]:
    """The records with their columns called as the format calls them: key of the format -> column of the data."""
    for record in records:
        if record.error is not None or not isinstance(record.value, dict):
            yield record
            continue
        missing = [column for column in columns.values() if column not in record.value]
        # An Arrow table has no nulls here (they are taken for absent), and where that matters the format will say so.
        if len(missing) == len(columns):
            there = ", ".join(sorted(map(repr, record.value)))[:200] or "none"
            yield bad_record(record.source, f"there is no column '{missing[0]}', which columns names; there is {there}")
            continue
        kept = {key: value for key, value in record.value.items() if key not in columns.values()}
        renamed = {key: record.value[column] for key, column in columns.items() if column in record.value}
        yield Record(kept | renamed, record.source)
