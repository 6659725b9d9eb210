"""Memory and time of a run, by arithmetic alone: plain numbers in, plain numbers out; no model, no weights."""

from halfbyte.plan.advice import Advice, advise, most_tokens, smallest_budget
from halfbyte.plan.memory import LEVELS, LOGITS_BYTES, Footprint, Plan, Settings, optimizer_bytes

__all__ = [
    "LEVELS",
    "LOGITS_BYTES",
    "Advice",
    "Footprint",
    "Plan",
    "Settings",
    "advise",
    "most_tokens",
    "optimizer_bytes",
    "smallest_budget",
]
