"""Rows that are there before, word for word or nearly, in some 100 bytes a row.

Word for word is a 64-bit hash. Nearly is MinHash (Broder 1997, "On the resemblance and containment of documents"): of
all pieces of eight bytes that a text has, 64 random orders each name the first. Two texts agree in as many of the 64
as their sets of pieces overlap (Jaccard). One byte is kept of each. Only rows that agree in some four neighbouring
bytes (a band) are compared at all, which those of an overlap of 0.75 do but for one pair in four hundred.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from halfbyte.data.rows import Row

SIGNATURE_BYTES = 64
NEAR = 48  # of 64: an overlap of 0.75, so six sevenths of each text
_PIECE_BYTES = 8
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


def signature_of(row: Row) -> bytes:
    """SIGNATURE_BYTES, of what is said in the row."""
    return signature(_spoken(row)).tobytes()


class Repetition(NamedTuple):
    """A row that says what an earlier one does."""

    kind: str  # "duplicate", "near_duplicate" or "other_answer"
    source: str
    earlier: str  # the source of the row that it repeats


class RowIndex:
    """What is remembered of rows, to tell repetitions: two hashes, a signature and the place of each."""

    def __init__(self, near: bool = True) -> None:  # without, rows that are nearly equal are not found
        self.near = near
        self._wholes, self._prompts = array("Q"), array("Q")
        self._signatures = bytearray()
        self._files: dict[str, int] = {}
        self._places = array("q")  # file, line and row number; -1 where there is none

    def __len__(self) -> int:
        return len(self._wholes)

    def add(self, row: Row) -> None:
        self.add_hashes(row)
        if self.near:
            self.add_signature(signature_of(row))

    def add_signature(self, signature: bytes) -> None:
        """Of the first row whose hashes are there and that has none yet, where nearly equal rows are to be found."""
        self._signatures += signature

    def add_hashes(self, row: Row) -> None:
        whole, prompt = _hashes(row)
        self._wholes.append(whole)
        self._prompts.append(prompt)
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
        earlier = {
            "duplicate": _earlier_equal(self.wholes),
            "other_answer": _earlier_equal(self.prompts),
        }
        if self.near:
            earlier["near_duplicate"] = _earlier_near(self.signatures)
        for index in np.flatnonzero(np.max([*earlier.values()], axis=0) >= 0) if len(self) else ():
            kind = next(kind for kind, found in earlier.items() if found[index] >= 0)
            source, before = self.source(int(index)), self.source(int(earlier[kind][index]))
            if source != before:  # a mix may take a row more than once
                yield Repetition(kind, source, before)

    def near_rows_of(self, other: "RowIndex") -> Iterator[tuple[str, str]]:
        """The source of each row of `other` that is nearly one of these, and that one's."""
        if not (self.near and other.near):
            return
        near = _earlier_near(np.concatenate([self.signatures, other.signatures]))[len(self) :]
        for index, earlier in enumerate(near):
            while earlier >= len(self):  # a row of `other`, which may in its turn be nearly one of these
                earlier = near[earlier - len(self)]
            if earlier >= 0:
                yield other.source(index), self.source(int(earlier))

    @property
    def wholes(self) -> npt.NDArray[np.uint64]:
        """(rows,) hashes of the rows."""
        return np.array(self._wholes, np.uint64)

    @property
    def prompts(self) -> npt.NDArray[np.uint64]:
        """(rows,) hashes of the rows without their last answers."""
        return np.array(self._prompts, np.uint64)

    @property
    def signatures(self) -> npt.NDArray[np.uint8]:
        """(rows, SIGNATURE_BYTES)."""
        return np.frombuffer(bytes(self._signatures), np.uint8).reshape(-1, SIGNATURE_BYTES)


class TrainedOn:
    """Answers whether a held-out row is among the training rows."""

    def __init__(self, index: RowIndex) -> None:
        self._index = index
        self._wholes, self._prompts = (np.unique(of, return_index=True) for of in (index.wholes, index.prompts))

    def find(self, row: Row) -> tuple[str, str] | None:
        """Whether all of it or its question alone, and the source of the training row."""
        whole, prompt = _hashes(row)
        kinds = (
            ("held_out_in_training", self._wholes, whole),
            ("held_out_prompt_in_training", self._prompts, prompt),
        )
        for kind, (hashes, first), wanted in kinds:
            at = int(np.searchsorted(hashes, np.uint64(wanted)))
            if at < len(hashes) and int(hashes[at]) == wanted:
                return kind, self._index.source(int(first[at]))
        return None


def _hashes(row: Row) -> tuple[int, int]:
    """Of the whole row, and of it without what is learned last."""
    parts = _parts(row)
    return _hash(parts), _hash(parts[:-1]) if len(parts) > 1 else _hash([*parts, ""])


def _hash(parts: list[str]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.strip().encode(errors="replace")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def _parts(row: Row) -> list[str]:
    if row.messages:
        return [f"{message['role']}\n{_said(message)}" for message in row.messages]
    return [piece.text for piece in row.pieces or ()]


def _said(message: dict[str, Any]) -> str:
    return "".join(str(message[key]) for key in ("reasoning_content", "content", "tool_calls") if message.get(key))


def _spoken(row: Row) -> str:
    # A long system message that all rows share would make them all alike.
    if row.messages:
        return "\n".join(_said(message) for message in row.messages if message["role"] != "system")
    return "".join(piece.text for piece in row.pieces or ())


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
