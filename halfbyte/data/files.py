"""From a file to records: one reader for each kind of file, told by the name."""

from collections.abc import Callable, Iterator
from pathlib import Path

from halfbyte.data.arrow_files import read_arrow, read_parquet
from halfbyte.data.compression import COMPRESSIONS
from halfbyte.data.json_files import read_json_lines, read_json_list
from halfbyte.data.records import Record
from halfbyte.data.table_files import read_csv, read_text, read_tsv
from halfbyte.errors import HalfbyteError

_Reader = Callable[[Path], Iterator[Record]]
_TEXT: dict[str, _Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_list,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
}
_BINARY: dict[str, _Reader] = {".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
KINDS = f"{', '.join((*_TEXT, *_BINARY))}; the text ones also with {' or '.join(COMPRESSIONS)}"


def is_data_file(path: Path) -> bool:
    return _reader(path) is not None


def read_file(path: Path) -> Iterator[Record]:
    """Every value of the file, in its order, read as it is asked for.

    Raises HalfbyteError, here or while reading, for a name that is no data file's, a file that cannot be read, and
    content from which nobody could go on.
    """
    reader = _reader(path)
    if reader is None:
        raise HalfbyteError(f"{path}: a data set is read from {KINDS}; not from '{path.suffix}'")
    return reader(path)


def _reader(path: Path) -> _Reader | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return _TEXT.get(suffixes[0]) if len(suffixes) == 2 else None
    return {**_TEXT, **_BINARY}.get(suffixes[-1]) if suffixes else None
