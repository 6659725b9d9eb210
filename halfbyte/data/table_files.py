"""Tables and plain text: CSV and TSV with a header, and .txt, where every line that is not blank is a row."""

import csv
from collections.abc import Iterator
from pathlib import Path

from halfbyte.data.compression import read_lines
from halfbyte.data.records import LONGEST_RECORD_BYTES, Record, bad_record
from halfbyte.errors import HalfbyteError


def read_csv(path: Path) -> Iterator[Record]:
    return _read_table(path, ",")


def read_tsv(path: Path) -> Iterator[Record]:
    return _read_table(path, "\t")


def read_text(path: Path) -> Iterator[Record]:
    """{"text": line} for every line that is not blank."""
    empty = True
    for number, line in enumerate(read_lines(path), start=1):
        source = f"{path}:{number}"
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield bad_record(source, f"not valid UTF-8 ({error.reason}): save the file as UTF-8")
            empty = False
            continue
        if text.strip():
            yield Record({"text": text}, source)
            empty = False
    if empty:
        raise HalfbyteError(f"{path}: the file is empty")


def _read_table(path: Path, delimiter: str) -> Iterator[Record]:
    """{column: text} for every row; the source is the line that the row begins on.

    Raises HalfbyteError with file and line for a header that names no column or one twice, and for quotes that
    nobody could go on from.
    """
    lines = _Lines(path)
    # The standard library's own limit, 128 KiB a field, is short for a text; and it is one for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD_BYTES))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        begins = lines.number + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise HalfbyteError(f"{path}:{begins}: not a row of a table: {error}") from None
        if cells is None:
            break
        bad_lines, lines.bad = lines.bad, []
        if bad_lines:
            bad = bad_record(f"{path}:{bad_lines[0]}", "not valid UTF-8: save the file as UTF-8")
            if header is None and bad.error is not None:
                raise bad.error
            yield bad
        elif not cells:  # a blank line
            continue
        elif header is None:
            header = _header(cells, f"{path}:{begins}")
        elif len(cells) != len(header):
            yield bad_record(
                f"{path}:{begins}", f"{len(cells)} cells in this row, where the header names {len(header)} columns"
            )
        else:
            yield Record(dict(zip(header, cells, strict=True)), f"{path}:{begins}")
    if header is None:
        raise HalfbyteError(f"{path}: the file is empty")


def _header(cells: list[str], source: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names):
        raise HalfbyteError(f"{source}: column {names.index('') + 1} of the header has no name")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise HalfbyteError(f"{source}: the header names the column '{repeated[0][:40]}' twice")
    return names


class _Lines:
    """The lines of a file as text, for csv.reader, with account of those that are not UTF-8."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self.number = 0
        self.bad: list[int] = []  # since it was last emptied

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError:
            self.bad.append(self.number)
            return line.decode("utf-8", errors="replace")
