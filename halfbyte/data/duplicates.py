"""Rows that are there before, word for word or nearly, in some 100 bytes a row.

Word for word is a 64-bit hash. Nearly is MinHash (Broder 1997, "On the resemblance and containment of documents"): of
all pieces of five bytes that a text has, 64 random orders each name the first. Two texts agree in as many of the 64
as their sets of pieces overlap (Jaccard). One byte is kept of each. Only rows that agree in some four neighbouring
bytes (a band) are compared at all, which those of an overlap of 0.8 do but for one pair in four thousand.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from halfbyte.data.rows import Row

SIGNATURE_BYTES = 64
NEAR = 52  # of 64: an overlap of 0.81, so about nine tenths of each text
_PIECE_BYTES = 5
_PIECES_AT_ONCE = 2048  # half a megabyte of products, which a cache holds
_TEXT_BYTES = 1 << 16  # of a longer text the beginning is compared

_SOURCE = re.compile(r"^(?P<file>.*?)(?::(?P<line>\d+))?(?: \(row (?P<row>\d+)\))?$", re.DOTALL)

_orders = np.random.Generator(np.random.PCG64(20140805)).integers(0, 2**32, (3, 64), np.uint32)
_MULTIPLIERS, _OFFSETS = _orders[0] | 1, _orders[1]
_POWERS = _orders[2, :_PIECE_BYTES] | 1


def signature(text: str) -> npt.NDArray[np.uint8]:
    """(64,) MinHash of the text, in small letters and with any white space as one space."""
    data = " ".join(text.lower().split()).encode(errors="replace")[:_TEXT_BYTES]
    letters = np.frombuffer(data.ljust(_PIECE_BYTES, b"\0"), np.uint8).astype(np.uint32)
    count = len(letters) - _PIECE_BYTES + 1
    pieces = np.zeros(count, np.uint32)
    for place, power in enumerate(_POWERS):
        pieces += (letters[place : place + count] + np.uint32(1)) * power
    pieces ^= pieces >> np.uint32(16)  # murmur3's last steps: letters differ in few bits, an order wants all 32
    pieces *= np.uint32(0x85EBCA6B)
    pieces ^= pieces >> np.uint32(13)
    first = np.full(SIGNATURE_BYTES, 2**32 - 1, np.uint32)
    for start in range(0, count, _PIECES_AT_ONCE):
        ordered = pieces[start : start + _PIECES_AT_ONCE, None] * _MULTIPLIERS + _OFFSETS
        np.minimum(first, ordered.min(axis=0), out=first)
    # The least of many numbers begins with zeros: mixed once more before a byte is taken.
    return ((first * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)


def similarity(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """How far two texts overlap, 0 to 1, as their signatures tell: to about 0.05."""
    return float((one == other).mean())


class Repetition(NamedTuple):
    """A row that says what an earlier one does."""

    kind: str  # "duplicate", "near_duplicate" or "other_answer"
    source: str
    earlier: str  # the source of the row that it repeats


class RowIndex:
    """What is remembered of rows, to tell repetitions: two hashes, a signature and the place of each."""

    def __init__(self) -> None:
        self._wholes = array("Q")
        self._prompts = array("Q")
        self._signatures = bytearray()
        self._files: dict[str, int] = {}
        self._places = array("q")  # file, line and row number; -1 where there is none
        self._sorted: dict[int, npt.NDArray[np.intp]] = {}

    def __len__(self) -> int:
        return len(self._wholes)

    def add(self, row: Row) -> None:
        self._sorted.clear()
        whole, prompt = _hashes(row)
        self._wholes.append(whole)
        self._prompts.append(prompt)
        self._signatures += signature(_spoken(row)).tobytes()
        place = _SOURCE.match(row.source)
        assert place is not None  # every text matches
        self._places.append(self._files.setdefault(place["file"], len(self._files)))
        self._places.extend(int(place[name]) if place[name] else -1 for name in ("line", "row"))

    def source(self, index: int) -> str:
        """Where the row numbered `index`, from 0, came from."""
        file, line, row = self._places[3 * index : 3 * index + 3]
        text = list(self._files)[file]
        return text + (f":{line}" if line >= 0 else "") + (f" (row {row})" if row >= 0 else "")

    def repetitions(self) -> Iterator[Repetition]:
        """Every row that repeats an earlier one, once, in the order of the rows."""
        wholes, prompts, signatures = self._arrays()
        duplicate = _earlier_equal(wholes)
        other_answer = _earlier_equal(prompts)
        near = _earlier_near(signatures)
        for index in np.flatnonzero((duplicate >= 0) | (other_answer >= 0) | (near >= 0)):
            for kind, earlier in (("duplicate", duplicate), ("other_answer", other_answer), ("near_duplicate", near)):
                if earlier[index] >= 0:
                    yield Repetition(kind, self.source(int(index)), self.source(int(earlier[index])))
                    break

    def find_whole(self, row: Row) -> str | None:
        """The source of a row that is this one word for word."""
        return self._find(self._wholes, _hashes(row)[0])

    def find_prompt(self, row: Row) -> str | None:
        """The source of a row with the same beginning up to its last answer."""
        return self._find(self._prompts, _hashes(row)[1])

    def near_rows_of(self, other: "RowIndex") -> Iterator[tuple[str, str]]:
        """Of each row of `other` that is nearly one of these, and not one of these: its source, and that row's."""
        here, there = self._arrays(), other._arrays()
        near = _earlier_near(np.concatenate([here[2], there[2]]))[len(self) :]
        # The nearest earlier row may be one of `other`; then that one's place among these is its own.
        for index, earlier in enumerate(near):
            while earlier >= len(self):
                earlier = near[earlier - len(self)]
            if 0 <= earlier and here[0][earlier] != there[0][index]:
                yield other.source(index), self.source(int(earlier))

    def _arrays(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        signatures = np.frombuffer(bytes(self._signatures), np.uint8).reshape(-1, SIGNATURE_BYTES)
        return np.array(self._wholes, np.uint64), np.array(self._prompts, np.uint64), signatures

    def _find(self, hashes: "array[int]", wanted: int) -> str | None:
        values = np.frombuffer(hashes, np.uint64)
        order = self._sorted.get(id(hashes))
        if order is None:
            order = self._sorted[id(hashes)] = np.argsort(values, kind="stable")
        at = int(np.searchsorted(values, np.uint64(wanted), sorter=order))
        found = at < len(order) and int(values[order[at]]) == wanted
        return self.source(int(order[at])) if found else None


def _hashes(row: Row) -> tuple[int, int]:
    """Of the whole row, and of it without its last answer."""
    turns = [(str(message.get("role")), _content(message)) for message in row.messages]
    return _hash(turns), _hash(turns[:-1])


def _hash(turns: list[tuple[str, str]]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for turn in turns:
        for text in turn:
            data = text.strip().encode(errors="replace")
            digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def _content(message: dict[str, object]) -> str:
    return str(message.get("content") or "") + str(message.get("tool_calls") or "")


def _spoken(row: Row) -> str:
    # A long system message that all rows share would make them all alike.
    return "\n".join(_content(message) for message in row.messages if message.get("role") != "system")


def _earlier_equal(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """For each its first equal before it, or -1."""
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[which]
    return np.where(earlier < np.arange(len(hashes)), earlier, -1)


def _earlier_near(signatures: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """For each an earlier one that agrees in NEAR bytes, or -1."""
    near = np.full(len(signatures), -1, np.intp)
    bands = np.ascontiguousarray(signatures).view(np.uint32)  # four bytes each
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        same = band[order[1:]] == band[order[:-1]]  # as the one before in this order, which is the earlier row
        begins = np.concatenate([[True], ~same])
        first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        for earlier in (first, np.concatenate([order[:1], order[:-1]])):
            open_ = np.flatnonzero(~begins & (near[order] < 0))
            agree = (signatures[order[open_]] == signatures[earlier[open_]]).sum(axis=1) >= NEAR
            near[order[open_[agree]]] = earlier[open_[agree]]
    return near
