"""What a run will take, told without running it: memory by part, its peak, the time of a step, what to change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from halfbyte.config import PlanConfig
from halfbyte.data import Example, lengths_of, pack
from halfbyte.huggingface import prepare_tokenizer
from halfbyte.huggingface.miniature import time_pass
from halfbyte.plan import Advice, Plan, advise, most_tokens, smallest_budget
from halfbyte.recipes.planning import count_steps, plan_run
from halfbyte.recipes.tokenizing import read_data

CALIBRATION_SECONDS = 10.0


@dataclass(frozen=True)
class PlanReport:
    """The answer of `halfbyte plan`."""

    plan: Plan
    parameters: int
    quantized_parameters: int
    advice: Advice | None  # for a run that does not fit
    steps: int | None  # None where neither max_steps nor a data set says
    step_seconds: float | None  # on this machine; None where it was not asked for

    @property
    def run_seconds(self) -> float | None:
        return None if self.steps is None or self.step_seconds is None else self.steps * self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; sizes in bytes."""
        plan = self.plan
        return {
            "parts": plan.parts(),
            "moments": plan.moments(),
            "peak_bytes": plan.peak_bytes,
            "peak_moment": plan.peak_moment,
            "least_bytes": plan.least_bytes,
            "mapped_bytes": plan.footprint.mapped_bytes,
            "budget_bytes": plan.budget_bytes,
            "fits": plan.fits,
            "level": plan.settings.level,
            "levels": {
                level: {
                    "activation_bytes": plan.with_settings(level=level).parts()["activations"],
                    "peak_bytes": plan.with_settings(level=level).peak_bytes,
                    "most_tokens": tokens,
                }
                for level, tokens in most_tokens(plan).items()
            },
            "smallest_budget_bytes": smallest_budget(plan),
            "changes": self.advice.changes if self.advice else {},
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "run_seconds": self.run_seconds,
        }


def plan(config: PlanConfig, console: Console, with_time: bool = True) -> PlanReport:
    """What the command line calls.  Reads the data set if there is one, and no weight.

    Raises:
        HalfbyteError: bad input; a model that cannot be measured without its weights.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    train: Sequence[Example] = []
    held_out: Sequence[Example] = []
    if config.dataset is not None:
        tokenizer = prepare_tokenizer(config.model_name_or_path, None, config.chat_template, config.system_prompt)
        train, held_out = read_data(config, tokenizer, console)
        if config.packing:
            train = pack(train, config.max_length)
    planned, inventory, family = plan_run(config, train, held_out)
    steps = count_steps(config, len(train))[1] if train or config.max_steps > 0 else None
    step_seconds = None
    if with_time:
        settings = planned.settings
        took = time_pass(family, settings.level, settings.rows, settings.length, CALIBRATION_SECONDS)
        filled = float(lengths_of(train).sum()) / (len(train) * settings.length) if train else 1.0
        update = took["update"] * sum(planned.trained_sizes())
        step_seconds = took["pass"] * settings.accumulation * filled + update
    return PlanReport(
        planned, inventory.parameters, inventory.quantized_parameters, advise(planned), steps, step_seconds
    )
