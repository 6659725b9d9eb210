"""JSON files: one object a line (.jsonl), or one list whose elements are decoded one by one (.json).

Both are read a piece at a time, so a file may be larger than memory. Blank lines are passed over.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.compression import read_chunks, read_lines
from halfbyte.data.records import LONGEST_RECORD_BYTES, Record, bad_record
from halfbyte.errors import HalfbyteError

_JSON_SPACE = " \t\r\n"  # str.strip() alone would take more than JSON calls white space
_SKIP_SPACE = re.compile(f"[{_JSON_SPACE}]*")
_KEPT_CHARACTERS = 1 << 20  # so much of a list that was read already may stay in memory
_LONGEST_ESCAPE = 16  # an error so near to the end of what is read may be a word or an escape that goes on


def read_json_lines(path: Path) -> Iterator[Record]:
    """Every line's value. A line that is not JSON is a record with an error, and the next line is read."""
    empty = True
    for number, line in enumerate(read_lines(path), start=1):
        source = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip(_JSON_SPACE)
        except UnicodeDecodeError as error:
            empty = False
            yield bad_record(source, f"not valid UTF-8 ({error.reason}): save the file as UTF-8")
            continue
        if not text:
            continue
        empty = False
        try:
            value, end = _decode(_DECODER, text, 0)
        except _NotJsonError as error:
            yield bad_record(source, f"{error.sentence} (column {error.position + 1})")
            continue
        if end < len(text):
            yield bad_record(source, "more text after the first value: a .jsonl file has one object a line")
        elif number == 1 and isinstance(value, list):
            raise HalfbyteError(f"{source}: a row must be an object, this is a list: a file of one list is named .json")
        else:
            yield Record(value, source)
    if empty:
        raise HalfbyteError(f"{path}: the file is empty")


def read_json_list(path: Path) -> Iterator[Record]:
    """Every element of the list. Where one is not JSON nobody can tell where the next begins, and that is raised."""
    text = _Window(path)
    text.skip_space()
    if text.has_ended():
        raise HalfbyteError(f"{path}: the file is empty")
    if not text.startswith("["):
        raise HalfbyteError(
            f"{text.place()}: a .json data set must be one list [...]: a file of one object a line is named .jsonl"
        )
    text.advance(1)
    row = 0
    closed = text.startswith("]")
    if closed:
        raise HalfbyteError(f"{path}: the list is empty, there is nothing to learn")
    while not closed:
        row += 1
        source = f"{text.place()} (row {row})"
        try:
            yield Record(text.take_value(), source)
        except _RepeatedKeyError as error:
            yield bad_record(source, error.sentence)
        closed = text.startswith("]")
        if not closed:
            if not text.startswith(","):
                raise HalfbyteError(f"{text.place()}: the list is cut off or lacks a comma after row {row}")
            text.advance(1)
    text.advance(1)
    if not text.has_ended():
        raise HalfbyteError(f"{text.place()}: there is text after the end of the list")


class _Window:
    """The part of a file's text that is being read, and the line it is on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = read_chunks(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._line, self._counted = 1, 0  # the line that the character `_counted` is on
        self._dropped = 0  # characters of the first line that were read and forgotten
        self._ended = False

    def place(self) -> str:
        return f"{self._path}:{self._line_of(self._position)}"

    def has_ended(self) -> bool:
        return self._position >= len(self._text) and not self._read_more()

    def startswith(self, character: str) -> bool:
        return not self.has_ended() and self._text[self._position] == character

    def advance(self, characters: int) -> None:
        self._position += characters
        self.skip_space()

    def skip_space(self) -> None:
        while True:
            match = _SKIP_SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text) or not self._read_more():
                return

    def take_value(self) -> Any:
        """The JSON value that begins here; what follows it is next, white space passed over.

        Raises HalfbyteError with file and line, or _RepeatedKeyError, after which the next value can be read.
        """
        decoder, repeated, wanted = _DECODER, None, 0
        while True:
            try:
                value, end = _decode(decoder, self._text, self._position)
            except _RepeatedKeyError as error:
                decoder, repeated = _LENIENT, error  # once more, to find where the value ends
                continue
            except _NotJsonError as error:
                if error.may_go_on and self._read_more(wanted):
                    wanted = len(self._text) - self._position  # twice as much, so that trying again costs little
                    continue
                line, column = self._line_of(error.position), self._column_of(error.position)
                raise HalfbyteError(f"{self._path}:{line}: {error.sentence} (column {column})") from None
            if end == len(self._text) and self._read_more():
                continue  # a number may go on in the next chunk
            self.advance(end - self._position)
            if repeated is not None:
                raise repeated
            return value

    def _read_more(self, characters: int = 0) -> bool:
        """Read at least one chunk and so many characters more; False at the end of the file."""
        if self._ended:
            return False
        if len(self._text) - self._position > LONGEST_RECORD_BYTES:
            raise HalfbyteError(f"{self.place()}: a value of more than {LONGEST_RECORD_BYTES >> 20} MiB is no row")
        if self._position > _KEPT_CHARACTERS or self._position == len(self._text):
            self._dropped = self._column_of(self._position) - 1
            self._line, self._counted = self._line_of(self._position), 0
            self._text, self._position = self._text[self._position :], 0
        parts, read = [], 0
        while not self._ended and read <= characters:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            try:
                parts.append(self._decoder.decode(chunk, final=self._ended))
            except UnicodeDecodeError as error:
                line = self._line_of(len(self._text)) + sum(part.count("\n") for part in parts)
                line += error.object.count(b"\n", 0, error.start)
                raise HalfbyteError(
                    f"{self._path}:{line}: not valid UTF-8 ({error.reason}): save the file as UTF-8"
                ) from None
            read += len(parts[-1])
        self._text += "".join(parts)
        return read > 0

    def _line_of(self, position: int) -> int:
        if position < self._counted:
            return self._line - self._text.count("\n", position, self._counted)
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def _column_of(self, position: int) -> int:
        start = self._text.rfind("\n", 0, position) + 1
        return position - start + 1 + (0 if start else self._dropped)


class _NotJsonError(ValueError):
    """What is wrong, where in the text, and whether more text could mend it."""

    def __init__(self, sentence: str, position: int, may_go_on: bool) -> None:
        super().__init__(sentence)
        self.sentence, self.position, self.may_go_on = sentence, position, may_go_on


class _RepeatedKeyError(_NotJsonError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):  # json.loads would keep the last one and say nothing
        names = [name for name, _ in pairs]
        repeated = next(name for name in record if names.count(name) > 1)
        raise _RepeatedKeyError(f"the key '{repeated[:40]}' occurs twice in one object", 0, False)
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LENIENT = json.JSONDecoder()


def _decode(decoder: json.JSONDecoder, text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins at `position`, and where it ends."""
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        near_end = error.pos >= len(text) - _LONGEST_ESCAPE or error.msg.startswith("Unterminated string")
        raise _NotJsonError(f"not valid JSON: {error.msg}", error.pos, near_end) from None
    except _RepeatedKeyError:
        raise
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        sentence = "the JSON nests too deeply or holds a number too long to read"
        raise _NotJsonError(sentence, position, False) from None
