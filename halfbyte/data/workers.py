"""Work on rows on every core: chunks of them go out to processes, and what they become comes back in their order.

Four fifths of the work are Python's (the template, the mask), which threads would take turns at. Processes are
forked, so that a tokenizer of any kind need not be sent to them and their memory is the parent's until they write.
Where a system cannot fork, the rows are tokenized in this process.

The result does not depend on the number of processes: what a chunk becomes is a function of its rows alone.
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
from functools import partial
from itertools import islice
from multiprocessing import connection
from typing import Any

import torch

from halfbyte.data.encoding import EncodingStatistics
from halfbyte.data.examples import Example
from halfbyte.data.rows import Row
from halfbyte.data.token_store import Chunk, chunk_of
from halfbyte.errors import HalfbyteError

Encode = Callable[[Sequence[Row]], tuple[list[Example], EncodingStatistics]]
Work = Callable[[list[Row]], Any]


class ProcessEndedError(HalfbyteError):
    """A process was ended from outside; no row is at fault, and what was done before stays."""


CHUNK_ROWS = 512
MOST_PROCESSES = 16  # one process reads for all; beyond about so many, the others would wait for it


def can_fork() -> bool:
    """Whether a process may be forked and go on running Python: not on Windows, and not safely on macOS."""
    return sys.platform == "linux"


def encode_in_chunks(rows: Iterable[Row], encode: Encode, processes: int) -> Iterator[Chunk]:
    """The rows, tokenized, as `work_in_chunks` does it.

    Raises:
        HalfbyteError: of the first row that `encode` refuses, once all chunks before it were given; or a process
            was ended from outside, which is a ProcessEndedError.
    """
    return work_in_chunks(rows, partial(_encode_chunk, encode), processes)


def work_in_chunks(rows: Iterable[Row], work: Work, processes: int) -> Iterator[Any]:
    """What `work` makes of the rows, `CHUNK_ROWS` of them at a time and in their order; never many at once in memory.

    Raises:
        HalfbyteError: what `work` raises, once all chunks before were given; a process was ended from outside.
    """
    chunks = _batched(iter(rows), CHUNK_ROWS)
    if processes <= 1 or not can_fork():
        return (work(chunk) for chunk in chunks)
    return _work_in_processes(chunks, work, min(processes, MOST_PROCESSES))


def _batched(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _encode_chunk(encode: Encode, rows: list[Row]) -> Chunk:
    examples, statistics = encode(rows)
    return chunk_of(len(rows), examples, asdict(statistics))


def _work_in_processes(chunks: Iterator[list[Row]], work: Work, processes: int) -> Iterator[Any]:
    # Said before the fork, or tokenizers' threads, which no fork carries over, draw a warning from each process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(processes, context, _begin_process, (work,))
    waiting: deque[Future[Any]] = deque()
    try:
        for chunk in chunks:
            with warnings.catch_warnings():
                # Python 3.12 and later warn of any fork beside threads. torch's and tokenizers' are not used after it.
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(executor.submit(_work_in_process, chunk))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ProcessEndedError(
            "a process that worked on the rows was ended from outside, most likely for want of memory: run it again,"
            " and what a run has tokenized is gone on from; with threads: 1 it takes the least."
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_work: Work | None = None  # of a worker process


def _begin_process(work: Work) -> None:
    global _work  # noqa: PLW0603
    _work = work
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


def _work_in_process(rows: list[Row]) -> Any:
    assert _work is not None
    return _work(rows)
