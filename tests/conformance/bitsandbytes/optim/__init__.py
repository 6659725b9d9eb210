"""Optimizers over `halfbyte.optim.AdamW`. The other ones of bitsandbytes can be named, and not made."""

from . import adam, adamw, ademamix, optimizer
from .adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit
from .adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from .ademamix import AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit
from .optimizer import OTHERS, GlobalOptimManager

globals().update(OTHERS)

__all__ = [  # noqa: PLE0604  (some of the names are made above)
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "adam",
    "adamw",
    "ademamix",
    "optimizer",
    *OTHERS,
]
