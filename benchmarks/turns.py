"""One side at a time: worker processes that stay alive, and the order in which they are asked.

A B A B: in each repetition every contestant has one turn, so that whatever slows the machine for a while slows all
of them, and a ratio is taken within a repetition. While one works the others sleep; that they do, and that nothing
else on the machine works meanwhile, is measured in each turn and told on the page.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.options import ROOT, Options
from benchmarks.results import Results

LONGEST_TURN_SECONDS = 3600.0
_WORKERS = ROOT / "benchmarks/workers"


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the text says why, in its own words."""


class Worker:
    """A process that measures when asked (benchmarks/workers/protocol.py says how they talk)."""

    def __init__(self, script: str, settings: dict[str, Any], options: Options, **environment: str) -> None:
        interpreter = options.peers_python if script.startswith("peer_") else options.halfbyte_python
        log = options.directory / "logs" / f"{script}-{time.strftime('%H%M%S')}-{time.monotonic_ns() % 10**6}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [interpreter, _WORKERS / f"{script}.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=worker_environment(options.threads) | environment,
            )
        try:
            self.facts: dict[str, Any] = self._say({"threads": options.threads, **settings})["ready"]
        except WorkerError:
            self.stop()
            raise

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._say(request)

    def stop(self) -> None:
        """End of input is what a worker leaves at. To stop it twice does no harm."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _say(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(LONGEST_TURN_SECONDS):
                self.process.kill()
                raise WorkerError(f"no answer in {LONGEST_TURN_SECONDS:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _died(self) -> WorkerError:
        code = self.process.wait()
        last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        why = "killed, most likely for want of memory" if code == -9 else f"ended with {code}"
        return WorkerError(f"{why}: {''.join(last)[:300]}")


@contextlib.contextmanager
def workers(*started: Worker) -> Iterator[None]:
    """Stops them at the end, whatever comes."""
    try:
        yield
    finally:
        for worker in started:
            worker.stop()


def worker_environment(threads: int) -> dict[str, str]:
    """The same for both sides: as many threads as cores, no network, no chatter."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    # PYTHONPATH would lead both interpreters to the same packages.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, **pinned, **quiet}


@dataclass(frozen=True)
class Lane:
    """A contestant: a worker, and what it is asked in each of its turns."""

    name: str
    worker: Worker
    request: dict[str, Any]


def alternate(
    lanes: Sequence[Lane],
    repeats: int,
    options: Options,
    results: Results,
    workload: str,
    warm_up: bool = True,  # False: the workers warm up themselves, or what is measured includes it
) -> dict[str, list[dict[str, Any]]]:
    """Every lane once, uncounted; then `repeats` rounds. The turns of each lane, in order."""
    turns: dict[str, list[dict[str, Any]]] = {lane.name: [] for lane in lanes}
    before: Worker | None = None
    for repetition in range(-1 if warm_up else 0, repeats):
        for lane in lanes:
            others = [other.worker for other in lanes if other.worker is not lane.worker]
            if lane.worker is not before:
                time.sleep(0 if options.smoke else options.settle_seconds)
            before = lane.worker
            turn = _take_turn(lane, others)
            turn = {"workload": workload, "lane": lane.name, "repetition": repetition, **turn}
            results.add("turn", **turn)
            if repetition >= 0:
                turns[lane.name].append(turn)
            print(f"  {workload} {'warm-up' if repetition < 0 else repetition + 1}: {lane.name}", file=sys.stderr)
    return turns


def _take_turn(lane: Lane, others: Sequence[Worker]) -> dict[str, Any]:
    # The same worker may stand behind several lanes.
    idle = {worker.process.pid for worker in others}
    before, idle_before, started = _busy_seconds(), _seconds_of(idle), time.perf_counter()
    own_before = _seconds_of({lane.worker.process.pid})
    answer = lane.worker.measure(lane.request)
    elapsed = time.perf_counter() - started
    idle_seconds = _seconds_of(idle) - idle_before
    own_seconds = _seconds_of({lane.worker.process.pid}) - own_before
    foreign = _busy_seconds() - before - own_seconds - idle_seconds
    return {
        **answer,
        "core_seconds": elapsed * (os.cpu_count() or 1),  # of which:
        "idle_seconds": idle_seconds,  # the sides that should wait did not
        "foreign_seconds": foreign,  # somebody else worked; a tick of the clock may make it slightly negative
    }


def _busy_seconds() -> float:
    """Of all cores since the machine started: everything but idling and waiting for a disk."""
    times = psutil.cpu_times()._asdict()
    counted_twice = ("guest", "guest_nice")  # Linux has them in user and nice already
    return float(sum(v for name, v in times.items() if name not in ("idle", "iowait", *counted_twice)))


def _seconds_of(pids: set[int]) -> float:
    total = 0.0
    for pid in pids:
        times = psutil.Process(pid).cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total
