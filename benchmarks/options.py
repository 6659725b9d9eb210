"""How a benchmark run was asked for, and how large its workloads are."""

import os
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS = "ABCDEP"


@dataclass(frozen=True)
class Sizes:
    """The shapes that are measured. The defaults are the benchmark; others are for trying the harness out."""

    batch: int = 4  # A: rows of a step
    length: int = 512  # A: tokens of a row; B: the longest row
    rows: int = 512  # B: halfbyte's epoch
    peer_rows: int = 96  # B: the peer's, which would take a quarter of an hour over all of them
    scan_rows: int = 32  # B: to find the peer's best setting
    hidden: int = 4096  # C
    intermediate: int = 11008  # C
    lengths: tuple[int, ...] = (512, 2048)  # C
    prompt: str = "The keeper of the lighthouse wrote in his diary every evening, and that day he began:"  # E
    new_tokens: int = 128  # E
    curve_steps: int = 50  # the gate's training run


SMOKE = Sizes(
    batch=2,
    length=32,
    rows=16,
    peer_rows=16,
    scan_rows=16,
    hidden=256,
    intermediate=688,
    lengths=(32, 64),
    new_tokens=8,
    curve_steps=4,
)


@dataclass(frozen=True)
class Options:
    workloads: str = WORKLOADS
    repeats: int | None = None  # None: five turns a side, three where a turn takes minutes
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    sizes: Sizes = Sizes()
    smoke: bool = False
    # An idle side's OpenMP threads spin for a moment after their last region; let them fall asleep.
    settle_seconds: float = 1.0
    halfbyte_python: Path = ROOT / ".venv/bin/python"
    peers_python: Path = ROOT / ".peers/bin/python"
    model: Path = ROOT / ".peers/smollm2"
    directory: Path = ROOT / "runs/bench"

    def turns(self, default: int = 5) -> int:
        return self.repeats or (1 if self.smoke else default)
