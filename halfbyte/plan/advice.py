"""What to change in a run that does not fit, in the order of least harm.

First what changes no number and costs time alone: recompute more. Then the optimizer's state: in 8 bits, and in pages.
Then smaller micro-batches of which a step has more, so that it stays the same step. Only then what the adapter
learns is touched: shorter rows, and at last a smaller rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.plan.memory import Plan

_LENGTH_STEP = 64
_SHORTEST = 64
_SMALLEST_RANK = 4
_MANY_TOKENS = 1 << 20  # for which the logits' chunk is as large as it gets


@dataclass(frozen=True)
class Advice:
    """A plan that fits, and the keys that lead to it."""

    plan: Plan
    changes: dict[str, str]  # key -> value, as one types them


def advise(plan: Plan) -> Advice | None:
    """The first way to fit, each change on top of those before it; None where there is no way, or no need."""
    if plan.fits:
        return None
    tries = (_with_fewer_evaluated(tried) for tried in (plan, *_ways(plan)))
    return next((Advice(tried, _changes(plan, tried)) for tried in tries if tried.fits), None)


def smallest_budget(plan: Plan) -> int:
    """Bytes with which the run is possible as it is, but for what costs no accuracy: its level of recomputation."""
    return min(plan.with_settings(level=level).least_bytes for level in plan.levels())


def most_tokens(plan: Plan) -> dict[str, int]:
    """Level -> tokens of the largest micro-batch, rows × max_length, that fits at it; 0 where none does."""
    found = {}
    for level in plan.levels():
        least, twice = (
            plan.with_settings(level=level, rows=1, length=length, evaluated_rows=0).least_bytes
            for length in (_MANY_TOKENS, 2 * _MANY_TOKENS)
        )
        a_token = (twice - least) / _MANY_TOKENS
        fixed = 2 * least - twice
        found[level] = max(0, int((plan.budget_bytes - fixed) // a_token))
    return found


def _with_fewer_evaluated(plan: Plan) -> Plan:
    """Held-out rows in smaller passes, as long as they are what does not fit."""
    while plan.settings.evaluated_rows > 1 and plan.moments()["an evaluation"] > plan.budget_bytes:
        plan = plan.with_settings(evaluated_rows=plan.settings.evaluated_rows // 2)
    return plan


def _ways(plan: Plan) -> Iterator[Plan]:
    """Plans that take less and less."""
    for level in plan.levels():
        if plan.levels().index(level) > plan.levels().index(plan.settings.level):
            plan = plan.with_settings(level=level)
            yield plan
    if plan.settings.state_bits == 32 and not plan.settings.paged:
        plan = plan.with_settings(state_bits=8)
        yield plan
    if not plan.settings.paged:
        plan = plan.with_settings(paged=True)
        yield plan
    a_step = plan.settings.rows * plan.settings.accumulation
    for rows in range(plan.settings.rows - 1, 0, -1):
        if a_step % rows == 0:
            plan = plan.with_settings(rows=rows, accumulation=a_step // rows)
            yield plan
    shorter = (plan.settings.length - 1) // _LENGTH_STEP * _LENGTH_STEP
    for length in range(shorter, _SHORTEST - 1, -_LENGTH_STEP):
        plan = plan.with_settings(length=length, evaluated_length=min(length, plan.settings.evaluated_length))
        yield plan
    rank = plan.settings.rank // 2
    while rank >= _SMALLEST_RANK:
        plan = plan.with_settings(rank=rank)
        yield plan
        rank //= 2


def _changes(before: Plan, after: Plan) -> dict[str, str]:
    old, new = before.settings, after.settings
    changes = {}
    if new.level != old.level:
        changes["gradient_checkpointing"] = "auto"
    if (new.state_bits, new.paged) != (old.state_bits, old.paged):
        changes["optim"] = optimizer_name(new.state_bits, new.paged)
    if new.rows != old.rows:
        changes["per_device_train_batch_size"] = str(new.rows)
        changes["gradient_accumulation_steps"] = str(new.accumulation)
    if new.evaluated_rows != old.evaluated_rows:
        changes["per_device_eval_batch_size"] = str(new.evaluated_rows)
    if new.length != old.length:
        changes["max_length"] = str(new.length)
    if new.rank != old.rank:
        changes["lora_r"] = str(new.rank)
    return changes


def optimizer_name(state_bits: int, paged: bool) -> str:
    """The name that a configuration has for it."""
    if paged:
        return f"paged_adamw_{state_bits}bit"
    return "adamw" if state_bits == 32 else "adamw_8bit"
