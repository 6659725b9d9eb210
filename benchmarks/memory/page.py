"""The table and the picture in docs/memory.md, from what was measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.options import ROOT, Options
from benchmarks.results import Record

BEGIN, END = "<!-- figures of make bench-memory: begin -->", "<!-- figures of make bench-memory: end -->"
PICTURE = "memory.png"
_HEAD = (
    "| run | recomputation | planned | resident | ratio | anonymous | goal | a step |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def write_figures(records: list[Record], page: Path) -> None:
    """Replace what stands between the page's two marks, and the picture beside it; the last record of each run."""
    latest = list({record["name"]: record for record in records}.values())
    measured = [record for record in latest if not record["failure"]]
    command = [Options().peers_python, ROOT / "benchmarks/memory/plot.py", page.with_name(PICTURE)]
    drawn = subprocess.run(command, input=json.dumps(measured), text=True, capture_output=True, check=False)
    if drawn.returncode:
        print(f"no picture: {''.join(drawn.stderr.strip().splitlines()[-1:])}", file=sys.stderr)
    parts = [_HEAD + "\n" + "\n".join(map(describe, latest))]
    if not drawn.returncode:
        parts.append(f"![What each run held, by part, planned beside measured]({PICTURE})")
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}", encoding="utf-8")


def describe(record: Record) -> str:
    """A row of the table."""
    if record["failure"]:
        return f"| {record['name']} | failed: {' '.join(record['failure'].split())[-300:]} | | | | | | |"
    cells = [
        record["name"],
        record["level"],
        _gigabytes(record["planned_bytes"]),
        _gigabytes(record["resident_bytes"]),
        _ratio(record),
        _gigabytes(record["anonymous_bytes"]),
        _goal(record),
        f"{max(record['step_seconds']):.0f} s" if max(record["step_seconds"]) >= 10 else "",
    ]
    return f"| {' | '.join(cells)} |"


def ratio(record: Record) -> float | None:
    """Planned over measured; None where pages had to leave for lack of room, so that the peak is the machine's."""
    if record["planned_bytes"] > 0.9 * record["memory_bytes"]:
        return None
    return float(record["planned_bytes"] / record["resident_bytes"])


def _ratio(record: Record) -> str:
    found = ratio(record)
    return "–" if found is None else f"{found:.3f}"


def _goal(record: Record) -> str:
    setting: dict[str, Any] = record["setting"]
    for key, reached, what in (
        ("resident_goal", record["resident_bytes"], "resident"),
        ("anonymous_goal", record["anonymous_bytes"], "anonymous"),
    ):
        if setting[key] is not None:
            met = "met" if reached <= setting[key] * 1e9 else "**missed**"
            return f"{what} ≤ {setting[key]:g}: {met}"
    return ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"
