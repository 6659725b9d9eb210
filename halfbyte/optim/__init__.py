"""Optimizers and schedules."""

from halfbyte.optim.adamw import AdamW
from halfbyte.optim.schedules import SCHEDULES, learning_rate_factor

__all__ = ["SCHEDULES", "AdamW", "learning_rate_factor"]
