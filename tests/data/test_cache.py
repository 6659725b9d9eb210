"""The cache: the same examples as without it, made once, made anew when anything is different or damaged."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from halfbyte.data import (
    Alpaca,
    EncodingStatistics,
    Example,
    Row,
    cache,
    encode_or_recall,
    encode_rows,
    fingerprint,
    workers,
)
from halfbyte.data.cache import content_sha256, tokenizer_sha256
from halfbyte.data.token_store import Chunk, StoredExamples, StoreWriter
from halfbyte.errors import HalfbyteError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are large from eleven rows on, and tokenized four at a time."""
    monkeypatch.setattr(cache, "IN_MEMORY_ROWS", 10)
    monkeypatch.setattr(workers, "CHUNK_ROWS", 4)


def row(number: int) -> Row:
    return Row([{"role": "user", "content": f"{number}"}], f"rows.jsonl:{number + 1}", Alpaca(f"{number}", "", "x"))


def encode(rows: Sequence[Row]) -> tuple[list[Example], EncodingStatistics]:
    """A row is as many tokens as its number's remainder by 5, and no example at all where that is none."""
    numbers = [int(row.messages[0]["content"]) for row in rows]
    ids = [torch.full((number % 5,), number, dtype=torch.int32) for number in numbers]
    examples = [Example(i, i.clone(), row.source) for i, row in zip(ids, rows, strict=True) if len(i)]
    longest = max(map(len, ids))
    return examples, EncodingStatistics(rows=len(rows), examples=len(examples), longest=longest)


class Use:
    """One use of the cache, and what happened in it."""

    def __init__(self, directory: Path, rows: int = 50, processes: int = 1, **made_from: Any) -> None:
        self.directory, self.rows, self.processes, self.made_from = directory, rows, processes, made_from
        self.encoded: list[int] = []
        self.progress: list[int] = []
        self.said: list[str] = []

    def __call__(self, encode_chunk: Callable[..., Any] = encode) -> tuple[Sequence[Example], EncodingStatistics]:
        def counting(rows: Sequence[Row]) -> tuple[list[Example], EncodingStatistics]:
            self.encoded += [int(row.messages[0]["content"]) for row in rows]
            result: tuple[list[Example], EncodingStatistics] = encode_chunk(rows)
            return result

        return encode_or_recall(
            lambda: map(row, range(self.rows)),
            counting,
            lambda: self.made_from,
            self.directory,
            self.processes,
            self.progress.append,
            self.said.append,
        )


def places(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir()]


def test_few_rows_leave_nothing_behind(tmp_path: Path) -> None:
    use = Use(tmp_path / "cache", rows=10)
    examples, statistics = use()
    assert isinstance(examples, list)
    assert (len(examples), statistics.rows) == (8, 10)
    assert not (tmp_path / "cache").exists()


def test_many_rows_are_tokenized_once(tmp_path: Path) -> None:
    first, second = Use(tmp_path), Use(tmp_path)
    examples, statistics = first()
    assert first.encoded == list(range(50))
    assert first.progress == [0, *range(4, 49, 4), 50]
    assert isinstance(examples, StoredExamples)
    wanted, _ = encode([row(i) for i in range(50)])
    assert fingerprint(examples) == fingerprint(wanted)
    assert [example.source for example in examples] == [example.source for example in wanted]
    assert statistics == EncodingStatistics(rows=50, examples=40, longest=4)
    again, same_statistics = second()
    assert (second.encoded, second.said) == ([], [])
    assert fingerprint(again) == fingerprint(wanted)
    assert same_statistics == statistics
    assert not list(tmp_path.glob("*.writing"))


@pytest.mark.skipif(not workers.can_fork(), reason="this system does not fork")
@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_byte(tmp_path: Path, processes: int) -> None:
    Use(tmp_path / "one", rows=203)()
    use = Use(tmp_path / "more", rows=203, processes=processes)
    use()
    assert use.encoded == []  # by this process
    (one,), (more,) = places(tmp_path / "one"), places(tmp_path / "more")
    assert one.name == more.name
    for file in one.iterdir():
        assert file.read_bytes() == (more / file.name).read_bytes(), file.name


def test_what_decides_the_examples_decides_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Use(tmp_path, max_length=5)()
    Use(tmp_path, max_length=6)()
    monkeypatch.setattr(cache, "version", lambda name: "0.0.1")
    Use(tmp_path, max_length=6)()
    monkeypatch.setattr(cache, "_code_sha256", lambda: "changed")
    Use(tmp_path, max_length=6)()
    assert len(places(tmp_path)) == 4
    told = [json.loads((place / "cache.json").read_text())["made_from"] for place in places(tmp_path)]
    assert sorted(origin["max_length"] for origin in told) == [5, 6, 6, 6]


def test_files_and_tokenizers_are_known_by_their_content(tmp_path: Path, byte_level: Any, templates: Any) -> None:
    (tmp_path / "set" / "more").mkdir(parents=True)
    (tmp_path / "set" / "a.jsonl").write_text("1")
    (tmp_path / "set" / "more" / "b.jsonl").write_text("2")
    before = content_sha256(tmp_path / "set")
    assert list(before) == ["a.jsonl", "more/b.jsonl"]
    os.utime(tmp_path / "set" / "a.jsonl", (0, 0))
    assert content_sha256(tmp_path / "set") == before
    (tmp_path / "set" / "a.jsonl").write_text("3")
    assert content_sha256(tmp_path / "set") != before
    assert content_sha256(tmp_path / "set" / "a.jsonl") != content_sha256(tmp_path / "set" / "more" / "b.jsonl")

    tokenizer = byte_level()
    same = tokenizer_sha256(tokenizer)
    tokenizer(["of different", "lengths, these two"], padding=True, truncation=True, max_length=4)
    assert tokenizer_sha256(tokenizer) == tokenizer_sha256(byte_level()) == same
    others = [byte_level(template=templates["llama3"]), byte_level(eos_token="</s>"), byte_level(trim_offsets=True)]
    added = byte_level()
    added.add_tokens(["photosynthesis"])
    assert len({same, *map(tokenizer_sha256, [*others, added])}) == 5


class PowerCutError(BaseException):
    """Nothing catches it."""


def test_an_interrupted_run_is_gone_on_from(tmp_path: Path) -> None:
    undisturbed, _ = Use(tmp_path / "undisturbed")()

    def interrupted(rows: Sequence[Row]) -> Any:
        if rows[0].source.endswith(":21"):
            raise PowerCutError
        return encode(rows)

    with pytest.raises(PowerCutError):
        Use(tmp_path / "cache")(interrupted)
    (left,) = places(tmp_path / "cache")
    assert left.suffix == ".writing"
    with (left / "input_ids.bin").open("ab") as file:  # what a power cut may leave of the chunk that was being written
        file.write(b"torn")
    use = Use(tmp_path / "cache")
    examples, statistics = use()
    assert use.encoded == list(range(20, 50))
    assert use.said == ["going on with tokenizing after 20 rows, which are done"]
    assert use.progress[0] == 20
    assert fingerprint(examples) == fingerprint(undisturbed)
    assert statistics.rows == 50


def test_a_bad_row_is_the_first_one_and_leaves_nothing(tmp_path: Path) -> None:
    def refusing(rows: Sequence[Row]) -> Any:
        for row in rows:
            if int(row.messages[0]["content"]) in (23, 31):
                raise HalfbyteError(f"{row.source}: no")
        return encode(rows)

    for processes in (1, 2):
        with pytest.raises(HalfbyteError, match=r"^rows\.jsonl:24: no$"):
            Use(tmp_path, processes=processes)(refusing)
        assert not places(tmp_path)


def test_a_row_that_cannot_be_read_stops_it_too(tmp_path: Path) -> None:
    def read() -> Iterator[Row]:
        yield from map(row, range(30))
        raise HalfbyteError("rows.jsonl:31: broken")

    with pytest.raises(HalfbyteError, match=r"^rows\.jsonl:31: broken$"):
        encode_or_recall(read, encode, dict, tmp_path, 2, lambda _: None, lambda _: None)
    assert not places(tmp_path)


@pytest.mark.parametrize(
    "file", ["input_ids.bin", "learned.bin", "index.bin", "sources.bin", "chunks.jsonl", "cache.json"]
)
@pytest.mark.parametrize("damage", ["a bit", "cut", "gone"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, file: str, damage: str) -> None:
    undisturbed, _ = Use(tmp_path)()
    wanted = fingerprint(undisturbed)
    (place,) = places(tmp_path)
    data = bytearray((place / file).read_bytes())
    data[len(data) // 2] ^= 0x80
    if damage == "gone":
        (place / file).unlink()
    else:
        (place / file).write_bytes(data if damage == "a bit" else data[: len(data) // 2])
    use = Use(tmp_path)
    examples, _ = use()
    if file == "cache.json" and damage == "a bit":
        assert not use.encoded or use.encoded == list(range(50))  # what it was made from is told for people
    else:
        assert use.said == [f"the tokenized data in {place} are damaged and are made anew"]
        assert use.encoded == list(range(50))
    assert fingerprint(examples) == wanted


def test_a_cache_that_is_made_anew_leaves_its_readers_alone(tmp_path: Path) -> None:
    reader, _ = Use(tmp_path)()
    wanted = fingerprint(reader)
    (place,) = places(tmp_path)
    (place / "chunks.jsonl").unlink()
    Use(tmp_path)()
    assert fingerprint(reader) == wanted


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HalfbyteError, match=r"cannot be kept in .*: make room there or set data_cache_dir to another"):
        Use(tmp_path / "file" / "cache")()


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = StoreWriter.append

    def failing(writer: StoreWriter, chunk: Chunk) -> None:
        if len(writer.records) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(writer, chunk)

    monkeypatch.setattr(StoreWriter, "append", failing)
    with pytest.raises(HalfbyteError, match=r"cannot be kept in .* \(No space left on device\): make room"):
        Use(tmp_path, processes=2)()
    monkeypatch.undo()
    monkeypatch.setattr(cache, "IN_MEMORY_ROWS", 10)
    use = Use(tmp_path)
    use()
    assert use.progress[0] == 20


def test_two_runs_at_once_tokenize_once(tmp_path: Path) -> None:
    first, second = Use(tmp_path), Use(tmp_path)
    inside, go_on = threading.Event(), threading.Event()

    def slow(rows: Sequence[Row]) -> Any:
        inside.set()
        assert go_on.wait(60)
        return encode(rows)

    threads = [threading.Thread(target=first, args=(slow,)), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    while not second.said:
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert second.said == ["another run is tokenizing these data; waiting for it"]
    assert second.encoded == []


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from data import test_cache
    from halfbyte.data import cache, workers
    cache.IN_MEMORY_ROWS, workers.CHUNK_ROWS = 10, 4

    def encode(rows):
        if int(rows[0].messages[0]["content"]) >= 24:
            Path({stuck!r}).touch()
            time.sleep(600)
        return test_cache.encode(rows)

    test_cache.Use(Path({directory!r}), processes=2)(encode)
"""


@pytest.mark.skipif(not workers.can_fork(), reason="this system does not fork")
def test_a_killed_run_is_gone_on_from_and_leaves_no_process(tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    script = KILLED.format(tests=str(Path(__file__).parents[1]), stuck=str(stuck), directory=str(tmp_path / "cache"))
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], start_new_session=True)
    try:
        while not stuck.exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)  # for the chunks before it to be written
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = time.monotonic() + 30
    while _group_is_there(process.pid):
        assert time.monotonic() < ended, "the processes that tokenized outlive the run"
        time.sleep(0.05)
    (left,) = places(tmp_path / "cache")
    with FileLock(left.with_suffix(".lock"), timeout=0):
        pass
    use = Use(tmp_path / "cache")
    examples, _ = use()
    assert use.encoded == list(range(use.progress[0], 50))
    assert 8 <= use.progress[0] <= 24
    assert fingerprint(examples) == fingerprint(encode([row(i) for i in range(50)])[0])


def _group_is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not workers.can_fork(), reason="this system does not fork")
def test_a_process_that_is_ended_from_outside_is_one_sentence(tmp_path: Path) -> None:
    parent = os.getpid()

    def dying(rows: Sequence[Row]) -> Any:
        if os.getpid() != parent and rows[0].source.endswith(":33"):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(rows)

    with pytest.raises(HalfbyteError, match=r"ended from outside.*threads: 1"):
        Use(tmp_path, processes=2)(dying)
    assert not multiprocessing.active_children()
    use = Use(tmp_path)
    use()
    assert use.progress[0] > 0  # it went on from there, as the sentence says


@pytest.mark.parametrize("processes", [1, 2])
def test_a_real_tokenizer(tmp_path: Path, byte_level: Any, processes: int) -> None:
    tokenizer = byte_level()
    rows = [
        Row(
            [{"role": "user", "content": "very " * (i % 13)}, {"role": "assistant", "content": f"answer {i}"}],
            f"r.jsonl:{i + 1}",
        )
        for i in range(60)
    ]
    wanted, statistics = encode_rows(tokenizer, rows, 24)
    assert statistics.truncated
    examples, same = encode_or_recall(
        lambda: iter(rows),
        lambda some: encode_rows(tokenizer, some, 24),
        lambda: {"tokenizer": tokenizer_sha256(tokenizer)},
        tmp_path,
        processes,
        lambda _: None,
        lambda _: None,
    )
    assert fingerprint(examples) == fingerprint(wanted)
    assert same == statistics
