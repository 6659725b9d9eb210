"""Learning-rate schedules as pure functions of the step, so that a resumed run has nothing to restore."""

import math
from collections.abc import Callable

# Factor on the learning rate at `progress`, the share of the steps after the warm-up that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor for optimizer step `step`, counted from 0: a linear warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, progress))
