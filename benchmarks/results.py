"""What a run found, as JSON lines: each is written when it is known, so that a run cut short keeps what it has.

A line's `kind` says what it is:

    run      when, on what commit, with which options
    machine  the processor, its measured peaks, versions
    check    one part of the correctness gate
    scan     one setting that was tried to find a side's best
    turn     one measurement of one side
    row      one line of the table, with its pairwise ratios
    text     what another script of this directory printed
    note     a sentence for the page
"""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Results:
    """Collects a run's records and writes each to its file at once."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **values: Any) -> Record:
        record = {"kind": kind, **values}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def all(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def one(self, kind: str) -> Record:
        """The only record of its kind; empty if the run ended before it came."""
        return next(iter(self.all(kind)), {})


def read_results(path: Path) -> Results:
    results = Results()
    results.records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return results


def latest_of_each_workload(runs: list[Results]) -> list[tuple[Results, list[str]]]:
    """Each run with those of its workloads that no later run measured again; a run with none left is dropped."""
    taken: set[str] = set()
    chosen = []
    for results in reversed(runs):
        mine = sorted({row["workload"] for row in results.all("row")} - taken)
        taken.update(mine)
        if mine:
            chosen.append((results, mine))
    return chosen[::-1]
