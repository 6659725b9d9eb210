"""Tokenized examples on disk, written a chunk at a time, read through memory maps.

A store is a directory of plain files; every number is little-endian:

    input_ids.bin   int32            the ids of all examples, end to end
    learned.bin     uint8            1 where the token of that place is learned, else 0; labels follow from it
    index.bin       int64, (n, 2)    where an example's tokens end, and where its source ends in bytes
    sources.bin     UTF-8            "file:line" of each example, end to end
    chunks.jsonl    a line a chunk: rows, examples, tokens, source_bytes, statistics, and a SHA-256 of what the chunk
                    added to input_ids, learned, index and sources, in this order, and of the line's other values

Everything is appended, and a chunk's line after its data. So what a kill or a power cut leaves is a run of whole
chunks and perhaps a torn end; `read_chunks` finds the whole ones by their hashes, wherever the tear is.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from halfbyte.data.examples import IGNORE_INDEX, Example, LazyExamples

DATA_FILES = ("input_ids.bin", "learned.bin", "index.bin", "sources.bin")
CHUNKS_FILE = "chunks.jsonl"

_ID, _FLAG, _OFFSET = np.dtype("<i4"), np.dtype("u1"), np.dtype("<i8")
# A map's pages count as this process's memory from the first touch on. Linux maps up to 64 KiB around a touch, so
# letting go of all pages after so many examples keeps the two large maps below 64 MiB together.
_EXAMPLES_BETWEEN_RELEASES = 512


class Chunk(NamedTuple):
    """Some rows' examples in arrays: what travels between processes, and is appended to a store."""

    rows: int
    input_ids: NDArray[np.int32]  # (tokens,)
    learned: NDArray[np.uint8]  # (tokens,)
    lengths: NDArray[np.int64]  # (examples,)
    sources: list[str]
    statistics: dict[str, Any]  # JSON-able


class ChunkRecord(NamedTuple):
    """A line of `chunks.jsonl`."""

    rows: int
    examples: int
    tokens: int
    source_bytes: int
    sha256: str
    statistics: dict[str, Any]

    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes that the chunk has in each of the data files."""
        return 4 * self.tokens, self.tokens, 16 * self.examples, self.source_bytes


def chunk_of(rows: int, examples: Sequence[Example], statistics: dict[str, Any]) -> Chunk:
    """Raises ValueError for a label that is not its token's id: a store could not give it back."""
    ids = torch.cat([example.input_ids for example in examples]) if examples else torch.zeros(0, dtype=torch.int32)
    labels = torch.cat([example.labels for example in examples]) if examples else ids
    learned = labels != IGNORE_INDEX
    if not torch.equal(torch.where(learned, ids, IGNORE_INDEX), labels):
        raise ValueError("an example has a label that is neither its token's id nor -100")
    lengths = np.array([len(example.input_ids) for example in examples], np.int64)
    sources = [example.source for example in examples]
    return Chunk(rows, ids.int().numpy(), learned.to(torch.uint8).numpy(), lengths, sources, statistics)


def read_chunks(directory: Path) -> tuple[list[ChunkRecord], bool]:
    """The chunks that are whole, from the first on, and whether there is nothing beside them.

    Every byte is read and hashed, through files and not maps, a chunk at a time.
    """
    records: list[ChunkRecord] = []
    try:
        lines = (directory / CHUNKS_FILE).read_bytes().split(b"\n")
        with _Files(directory, "rb") as files:
            for line in lines[:-1]:
                record = _parse(line)
                if record is None:
                    return records, False
                parts = [file.read(size) for file, size in zip(files, record.sizes(), strict=True)]
                if _sha256(parts, record) != record.sha256:
                    return records, False
                records.append(record)
            complete = lines[-1] == b"" and not any(file.read(1) for file in files)
    except OSError:
        return records, False
    return records, complete


def _parse(line: bytes) -> ChunkRecord | None:
    try:
        record = ChunkRecord(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = record[:4]
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(record.statistics, dict):
        return None
    return record


def _sha256(parts: Sequence[bytes], record: ChunkRecord) -> str:
    digest = hashlib.sha256()
    for part in (*parts, _line(record._replace(sha256=""))):
        digest.update(part)
    return digest.hexdigest()


class _Files:
    """The four data files, opened together."""

    def __init__(self, directory: Path, mode: str) -> None:
        self._paths, self._mode = [directory / name for name in DATA_FILES], mode
        self._open: list[BinaryIO] = []

    def __enter__(self) -> list[BinaryIO]:
        try:
            for path in self._paths:
                self._open.append(path.open(self._mode))  # type: ignore[arg-type]
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self._open

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open:
            file.close()


class StoreWriter:
    """Appends chunks to a store, behind those that are whole there already."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.records, _ = read_chunks(directory)
        whole = [sum(record.sizes()[i] for record in self.records) for i in range(len(DATA_FILES))]
        whole.append(sum(len(_line(record)) for record in self.records))
        self._files = [(directory / name).open("ab") for name in (*DATA_FILES, CHUNKS_FILE)]
        for file, size in zip(self._files, whole, strict=True):
            file.truncate(size)
        self._tokens = sum(record.tokens for record in self.records)
        self._source_bytes = sum(record.source_bytes for record in self.records)

    def append(self, chunk: Chunk) -> None:
        """Write a chunk.  Raises OSError."""
        sources = [source.encode("utf-8", "surrogatepass") for source in chunk.sources]
        index = np.empty((len(chunk.lengths), 2), _OFFSET)
        index[:, 0] = self._tokens + np.cumsum(chunk.lengths)
        index[:, 1] = self._source_bytes + np.cumsum(np.array([len(source) for source in sources], np.int64))
        parts = [
            chunk.input_ids.astype(_ID).tobytes(),
            chunk.learned.astype(_FLAG).tobytes(),
            index.tobytes(),
            b"".join(sources),
        ]
        record = ChunkRecord(chunk.rows, len(chunk.lengths), len(chunk.input_ids), len(parts[3]), "", chunk.statistics)
        record = record._replace(sha256=_sha256(parts, record))
        for file, part in zip(self._files, [*parts, _line(record)], strict=True):
            file.write(part)
            file.flush()
        self.records.append(record)
        self._tokens += record.tokens
        self._source_bytes += record.source_bytes

    def sync(self) -> None:
        """Have it all on the disk.  Raises OSError."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()


def _line(record: ChunkRecord) -> bytes:
    return json.dumps(record._asdict(), separators=(",", ":")).encode() + b"\n"


class StoredExamples(LazyExamples):
    """The examples of a whole store: in memory are their lengths, 8 bytes each; the rest is the files'."""

    def __init__(self, directory: Path) -> None:
        self._ids = _Map(directory / "input_ids.bin", _ID)
        self._learned = _Map(directory / "learned.bin", _FLAG)
        self._sources = _Map(directory / "sources.bin", _FLAG)
        self._index = _Map(directory / "index.bin", _OFFSET)
        ends = self._index.values[::2]
        self.lengths = np.diff(ends, prepend=ends.dtype.type(0))
        self._made = 0

    def make(self, index: int) -> Example:
        end, source_end = self._index.values[2 * index : 2 * index + 2].tolist()
        begin, source_begin = self._index.values[2 * index - 2 : 2 * index].tolist() if index else (0, 0)
        ids = self._ids.values[begin:end].astype(np.int32)  # a copy: nobody can write to what all epochs read
        labels = np.where(self._learned.values[begin:end], ids, np.int32(IGNORE_INDEX))
        source = self._sources.values[source_begin:source_end].tobytes().decode("utf-8", "surrogatepass")
        self._made += 1
        if self._made % _EXAMPLES_BETWEEN_RELEASES == 0:
            for file in (self._ids, self._learned, self._sources, self._index):
                file.release()
        return Example(torch.from_numpy(ids), torch.from_numpy(labels), source)


class _Map:
    """A file as an array that the system pages in and out."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        with path.open("rb") as file:
            # Nothing of length 0 can be mapped.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
        self.values: NDArray[Any] = np.frombuffer(self._map if self._map is not None else b"", dtype)

    def release(self) -> None:
        """Let go of the pages; the next touch has them again, from the system's cache of the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
