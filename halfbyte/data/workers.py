"""Tokenizing on every core: chunks of rows go out to processes, and come back in their order.

Four fifths of the work are Python's (the template, the mask), which threads would take turns at. Processes are
forked, so that a tokenizer of any kind need not be sent to them and their memory is the parent's until they write.
Where a system cannot fork, the rows are tokenized in this process.

The result does not depend on the number of processes: a chunk's examples are a function of its rows alone.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from multiprocessing import connection

import torch

from halfbyte.data.encoding import EncodingStatistics
from halfbyte.data.examples import Example
from halfbyte.data.rows import Row
from halfbyte.data.token_store import Chunk, chunk_of
from halfbyte.errors import HalfbyteError

Encode = Callable[[Sequence[Row]], tuple[list[Example], EncodingStatistics]]


class ProcessEndedError(HalfbyteError):
    """A process was ended from outside; no row is at fault, and what was done before stays."""


CHUNK_ROWS = 512
MOST_PROCESSES = 16  # one process reads for all; beyond about so many, the others would wait for it


def can_fork() -> bool:
    """Whether a process may be forked and go on running Python: not on Windows, and not safely on macOS."""
    return sys.platform == "linux"


def encode_in_chunks(rows: Iterable[Row], encode: Encode, processes: int) -> Iterator[Chunk]:
    """The rows, tokenized, `CHUNK_ROWS` of them at a time and in their order; never many at once in memory.

    Raises:
        HalfbyteError: of the first row that `encode` refuses, once all chunks before it were given; or a process
            was ended from outside, which is a ProcessEndedError.
    """
    chunks = _batched(iter(rows), CHUNK_ROWS)
    if processes <= 1 or not can_fork():
        return (_encode_chunk(encode, chunk) for chunk in chunks)
    return _encode_in_processes(chunks, encode, min(processes, MOST_PROCESSES))


def _batched(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _encode_chunk(encode: Encode, rows: list[Row]) -> Chunk:
    examples, statistics = encode(rows)
    return chunk_of(len(rows), examples, asdict(statistics))


def _encode_in_processes(chunks: Iterator[list[Row]], encode: Encode, processes: int) -> Iterator[Chunk]:
    # Said before the fork, or tokenizers' threads, which no fork carries over, draw a warning from each process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(processes, context, _begin_process, (encode,))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for chunk in chunks:
            with warnings.catch_warnings():
                # Python 3.12 and later warn of any fork beside threads. torch's and tokenizers' are not used after it.
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(executor.submit(_encode_in_process, chunk))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ProcessEndedError(
            "a process that tokenized was ended from outside, most likely for want of memory: run it again, and it goes"
            " on from there; with threads: 1 it takes the least."
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_encode: Encode | None = None  # of a worker process


def _begin_process(encode: Encode) -> None:
    global _encode  # noqa: PLW0603
    _encode = encode
    gc.freeze()  # a collection would write to every object that is there, and so copy the parent's memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and is the parent's to answer
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork, and a region of one thread needs none
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed closes nothing, and its processes would wait for work for good.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_process(rows: list[Row]) -> Chunk:
    assert _encode is not None
    return _encode_chunk(_encode, rows)
