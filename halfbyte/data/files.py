"""From a file to JSON objects, each with the line it begins on.

`.jsonl` holds one object a line; `.json` holds one list, whose elements are decoded one by one so that the
line of each is known. Blank lines are passed over. Anything else that is not the format stops the reading
with file and line.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError

_JSON_SPACE = " \t\r\n"  # str.strip() alone would take more than JSON calls white space
_SKIP_SPACE = re.compile(f"[{_JSON_SPACE}]*")


def read_records(path: Path) -> Iterator[tuple[Any, str]]:
    """Every JSON value of the file, of whatever type, and its source: "file:line", in a list "file:line (row
    n)".

    Raises HalfbyteError for a suffix, a file, an encoding or a text that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl"):
        raise HalfbyteError(f"{path}: a data set is read from .json or .jsonl, not from '{suffix}'")
    text = _read_text(path)
    return _read_lines(text, path) if suffix == ".jsonl" else _read_list(text, path)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise HalfbyteError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # a folder, no permission; ValueError: a NUL character in the path
        raise HalfbyteError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    data = data.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that editors on Windows write
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise HalfbyteError(f"{path}:{line}: not valid UTF-8 ({error.reason}): save the file as UTF-8") from None
    if not text.strip(_JSON_SPACE):
        raise HalfbyteError(f"{path}: the file is empty")
    return text


def _read_lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    # Not splitlines(): JSON allows U+2028 and U+0085 inside a string, and splitlines() would cut there.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(_JSON_SPACE)
        if not line:
            continue
        source = f"{path}:{number}"
        record, end = _decode(line, 0, path, number - 1)
        if end < len(line):
            raise HalfbyteError(f"{source}: more text after the first value: a .jsonl file has one object a line")
        if number == 1 and isinstance(record, list):
            raise HalfbyteError(f"{source}: a row must be an object, this is a list: a file of one list is named .json")
        yield record, source


def _read_list(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        raise HalfbyteError(
            f"{path}:{_line(text, position)}: a .json data set must be one list [...]: "
            "a file of one object a line is named .jsonl"
        )
    position = _skip_space(text, position + 1)
    closed = text.startswith("]", position)
    line, counted, row = 1, 0, 0
    while not closed:
        line += text.count("\n", counted, position)
        counted, row = position, row + 1
        record, end = _decode(text, position, path)
        yield record, f"{path}:{line} (row {row})"
        position = _skip_space(text, end)
        closed = text.startswith("]", position)
        if not closed:
            if not text.startswith(",", position):
                raise HalfbyteError(
                    f"{path}:{_line(text, position)}: the list is cut off or lacks a comma after row {row}"
                )
            position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise HalfbyteError(f"{path}:{_line(text, position)}: there is text after the end of the list")


def _skip_space(text: str, position: int) -> int:
    match = _SKIP_SPACE.match(text, position)
    return match.end() if match else position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):  # json.loads would keep the last one and say nothing
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in record if names.count(name) > 1))
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _decode(text: str, position: int, path: Path, lines_before: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `position`, and where it ends. `lines_before` of the file are not in
    `text`."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise HalfbyteError(
            f"{path}:{lines_before + error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    except _RepeatedKeyError as error:
        line = lines_before + _line(text, position)
        raise HalfbyteError(f"{path}:{line}: the key '{str(error)[:40]}' occurs twice in one object") from None
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        line = lines_before + _line(text, position)
        raise HalfbyteError(f"{path}:{line}: the JSON nests too deeply or holds a number too long to read") from None
