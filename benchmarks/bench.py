"""What every workload needs: the options, the results, and a way to find a side's best setting."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.figures import Row
from benchmarks.options import Options
from benchmarks.results import Results
from benchmarks.turns import Worker, WorkerError


class RedCheckError(RuntimeError):
    """Something is not right, so nothing is told about how fast it is."""


@dataclass(frozen=True)
class Setting:
    """One way to run a side: what its process is started with, and what it is asked."""

    words: str  # for the table
    process: dict[str, Any]
    request: dict[str, Any]


@dataclass
class Bench:
    options: Options
    results: Results
    _started: list[Worker] = field(default_factory=list)

    def start(self, script: str, process: dict[str, Any], **environment: str) -> Worker:
        worker = Worker(script, {"model": str(self.options.model), **process}, self.options, **environment)
        self._started.append(worker)
        return worker

    def stop_all(self) -> None:
        """After a workload, however it ended: none of its workers is to hold memory during the next."""
        for worker in self._started:
            worker.stop()
        self._started.clear()

    def row(self, row: Row) -> None:
        self.results.add("row", **row.to_record())

    def best_setting(self, workload: str, script: str, candidates: Sequence[Setting]) -> Setting:
        """Try each once and return the fastest. One that fails is recorded with its reason, and is out."""
        speeds = []
        running: Worker | None = None
        process: dict[str, Any] | None = None
        try:
            for candidate in sorted(candidates, key=lambda candidate: repr(candidate.process)):
                print(f"  {workload} scan: {candidate.words}", file=sys.stderr)
                try:
                    if running is None or process != candidate.process:
                        if running is not None:
                            running.stop()
                        running, process = None, candidate.process
                        running = self.start(script, process)
                    turn = running.measure(candidate.request)
                except WorkerError as error:  # its process has ended; the next setting gets a new one
                    if running is not None:
                        running.stop()
                    running = None
                    self.results.add("scan", workload=workload, setting=candidate.words, failed=str(error))
                    continue
                speed = turn["units"] / turn["seconds"]
                speeds.append((speed, candidate))
                self.results.add("scan", workload=workload, setting=candidate.words, units_per_second=speed)
        finally:
            if running is not None:
                running.stop()
        if not speeds:
            raise WorkerError(f"{script} works in no setting; the last of its logs says why")
        return max(speeds, key=lambda pair: pair[0])[1]
