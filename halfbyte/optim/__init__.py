"""Optimizers and schedules."""

from halfbyte.optim.adamw import OPTIMIZERS, AdamW
from halfbyte.optim.paged import check_page_dir
from halfbyte.optim.schedules import SCHEDULES, learning_rate_factor

__all__ = ["OPTIMIZERS", "SCHEDULES", "AdamW", "check_page_dir", "learning_rate_factor"]
