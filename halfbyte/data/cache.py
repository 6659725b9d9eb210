"""Data sets that are tokenized once and kept: a token store for each, named by all that decides its bytes.

    data_cache_dir/
      KEY/            a whole store (token_store.py) and cache.json, which says what it was made from
      KEY.writing/    one that is being written, or was when its process ended: the next run goes on from there
      KEY.lock        held while one of the two is looked through or written

KEY is a SHA-256 of the data's content, the tokenizer with its chat template, the settings, the code of this folder
and the versions of what it stands on. So a changed file, template or release makes another cache, and none is
ever out of date. `data_cache_dir` can be removed at any time.

A small data set is not kept. Up to IN_MEMORY_ROWS rows are tokenized in a second or two, which is less than a model
takes to load, and a directory of files for each would be more trouble to everyone than that.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from halfbyte.data.encoding import EncodingStatistics
from halfbyte.data.examples import Example
from halfbyte.data.rows import Row
from halfbyte.data.templates import Tokenizer
from halfbyte.data.token_store import ChunkRecord, StoredExamples, StoreWriter, read_chunks
from halfbyte.data.workers import Encode, ProcessEndedError, encode_in_chunks
from halfbyte.errors import HalfbyteError

IN_MEMORY_ROWS = 4096

_CACHE_FILE = "cache.json"
_VERSIONS = ("halfbyte", "jinja2", "tokenizers", "transformers")

Encoded = tuple[Sequence[Example], EncodingStatistics]


def default_cache_dir() -> Path:
    """Where tokenized data sets are kept unless `data_cache_dir` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte" / "data"


def encode_or_recall(
    read: Callable[[], Iterator[Row]],  # begins with the first row at every call
    encode: Encode,
    made_from: Callable[[], Mapping[str, Any]],  # what decides the examples, JSON-able; asked only for large data
    directory: Path,
    processes: int,
    on_rows: Callable[[int], None],  # told how many rows are done
    say: Callable[[str], None],  # told, in a sentence, what a person would want to know
) -> Encoded:
    """The examples of the rows, from the cache where they are in it; a list where the rows are few.

    Raises:
        HalfbyteError: what `read` and `encode` raise, or the directory cannot be written.
    """
    rows = read()
    first = list(islice(rows, IN_MEMORY_ROWS + 1))
    if len(first) <= IN_MEMORY_ROWS:
        encoded = encode(first)
        on_rows(len(first))
        return encoded
    origin = {**made_from(), "code": _code_sha256(), "versions": {name: version(name) for name in _VERSIONS}}
    place = directory / hashlib.sha256(_json(origin).encode()).hexdigest()[:32]
    try:
        with _locked(place, say):
            found = _recall(place, say)
            if found is None:
                _write(place, origin, chain(first, rows), encode, processes, on_rows, say)
                found = _open(place, read_chunks(place)[0])
            return found
    except OSError as error:
        raise HalfbyteError(
            f"the tokenized data cannot be kept in {directory} ({error.strerror or error}): make room there or set "
            "data_cache_dir to another directory"
        ) from error


@contextmanager
def _locked(place: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Held within; the system takes it back from a process that ends, however it ends."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another run is tokenizing these data; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _recall(place: Path, say: Callable[[str], None]) -> Encoded | None:
    """What is kept, if every byte of it is what was written."""
    if not place.exists():
        return None
    records, complete = read_chunks(place)
    try:
        told = json.loads((place / _CACHE_FILE).read_text(encoding="utf-8"))
        if complete and told["chunks"] == len(records):
            return _open(place, records)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    say(f"the tokenized data in {place} are damaged and are made anew")
    shutil.rmtree(place)
    return None


def _open(place: Path, records: Sequence[ChunkRecord]) -> Encoded:
    statistics = EncodingStatistics()
    for record in records:
        statistics.add(EncodingStatistics(**record.statistics))
    return StoredExamples(place), statistics


def _write(
    place: Path,
    origin: Mapping[str, Any],
    rows: Iterable[Row],
    encode: Encode,
    processes: int,
    on_rows: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    aside = place.with_suffix(".writing")
    writer = StoreWriter(aside)
    try:
        done = sum(record.rows for record in writer.records)
        if done:
            say(f"going on with tokenizing after {done:,} rows, which are done")
        on_rows(done)
        for chunk in encode_in_chunks(islice(rows, done, None), encode, processes):
            writer.append(chunk)
            done += chunk.rows
            on_rows(done)
        writer.sync()
    except ProcessEndedError:
        raise
    except HalfbyteError:
        # The data or the settings are at fault: what mends them makes another key, and nobody would come back here.
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        writer.close()
    told = {"chunks": len(writer.records), "made_from": origin}
    with (aside / _CACHE_FILE).open("w", encoding="utf-8") as file:
        file.write(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(place)


# ── What the key is made of ──────────────────────────────────────────────────────────────────────────────────────────


def content_sha256(path: Path) -> dict[str, str]:
    """A file's SHA-256, or that of every file in a directory, by their paths in it."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def rows_sha256(rows: Iterable[Row]) -> str:
    """Of the rows themselves, for data that are in no local file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_json(asdict(row)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Of all that a tokenizer does: its vocabulary and rules, its chat template, its special tokens."""
    # Without truncation and padding, as the rows are encoded: a tokenizer remembers how it was called last.
    begins = list(tokenizer("", add_special_tokens=True, truncation=False, padding=False)["input_ids"])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    named = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "chat_template")}
    digest = hashlib.sha256(_json([named, begins]).encode("utf-8", "surrogatepass"))
    digest.update(backend.to_str().encode() if backend is not None else b"")
    return digest.hexdigest()


def _code_sha256() -> str:
    """Of this folder: a change to how rows are read or masked must not find what was made before it."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
