"""From a configuration to a plan: what the run will hold in memory, before anything of it is loaded."""

import math
from collections.abc import Sequence

import psutil
import torch
from peft import LoraConfig

from halfbyte.config import FinetuneConfig, PlanConfig
from halfbyte.data import Example, lengths_of
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.miniature import Family, make_miniatures, predict_activation_bytes
from halfbyte.huggingface.outline import Inventory, count_mapped_bytes, outline_model, take_inventory
from halfbyte.huggingface.source import reason
from halfbyte.optim import OPTIMIZERS
from halfbyte.plan import Footprint, Plan, Settings, advise, smallest_budget
from halfbyte.recipes.memory import give_back_freed_memory, whole_budget_bytes

TrainingConfig = FinetuneConfig | PlanConfig


class UnplannableError(HalfbyteError):
    """The model's class cannot be counted, or run with few layers, without its weights."""


def lora_config(config: TrainingConfig) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )


def count_steps(config: TrainingConfig, rows: int) -> tuple[int, int]:
    """Steps of an epoch of so many rows, and of the whole run."""
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(rows / rows_per_step)
    by_epochs = math.ceil(config.num_train_epochs * steps_per_epoch)
    return steps_per_epoch, config.max_steps if config.max_steps > 0 else by_epochs


def plan_run(
    config: TrainingConfig,
    train: Sequence[Example] = (),  # empty: rows of max_length are taken for granted
    held_out: Sequence[Example] = (),
) -> tuple[Plan, Inventory, Family]:
    """What the run would hold, at the level of recomputation that it would take; no weight is read.

    Raises:
        HalfbyteError: no such model, or `target_modules` names nothing in it.
        UnplannableError: the model's class cannot be run without its weights.
    """
    try:
        inventory, family, activation_bytes, mapped = _measure(config)
    except HalfbyteError:
        raise
    except Exception as error:  # a stranger's code on a model of our making: anything can be raised there
        raise UnplannableError(
            f"{config.model_name_or_path} cannot be measured without its weights"
            f" ({type(error).__name__}: {reason(error)})."
        ) from error
    give_back_freed_memory()
    resident = psutil.Process().memory_info().rss
    footprint = Footprint(
        quantized_bytes=inventory.quantized_bytes,
        remainder_bytes=inventory.remainder_bytes,
        largest_tensor_bytes=inventory.largest_tensor_bytes,
        adapter_sizes=inventory.adapter_sizes,
        adapter_rank=config.lora_r,
        layers=inventory.layers,
        vocabulary=inventory.vocabulary,
        activation_bytes=activation_bytes,
        # By now all that a run imports is there, and the miniatures, which will go.
        process_bytes=resident - family.nbytes,
        threads=torch.get_num_threads(),
        mapped_bytes=mapped,
    )
    settings = Settings(
        rows=_rows(config.per_device_train_batch_size, train),
        accumulation=config.gradient_accumulation_steps,
        length=_longest(train, config.max_length),
        level="full" if _recomputes_all(config) and "full" in activation_bytes else "none",
        rank=config.lora_r,
        offloading=config.activation_offloading,
        evaluated_rows=0 if config.eval_dataset is None else _rows(config.per_device_eval_batch_size, held_out),
        evaluated_length=_longest(held_out, config.max_length),
        **OPTIMIZERS[config.optim],
    )
    plan = Plan(footprint, settings, whole_budget_bytes(config.max_memory, resident))
    level_is_open = config.gradient_checkpointing == "auto" and not _recomputes_all(config)
    return (plan.at_fastest_level() if level_is_open else plan), inventory, family


def _recomputes_all(config: TrainingConfig) -> bool:
    return config.gradient_checkpointing is True or config.activation_offloading != "none"


def _measure(config: TrainingConfig) -> tuple[Inventory, Family, dict[str, float], int]:
    outline = outline_model(
        config.model_name_or_path,
        lora_config(config),
        config.quant_type,
        config.block_size,
        config.double_quant,
        getattr(torch, config.compute_dtype),
    )
    family = make_miniatures(outline)
    inventory = take_inventory(outline)
    mapped = count_mapped_bytes(config.model_name_or_path, outline)
    return inventory, family, predict_activation_bytes(family, inventory.layers), mapped


def describe_plan(plan: Plan) -> str:
    """The line for a person."""
    said = (
        f"plan: at most {plan.peak_bytes / 1e9:.2f} GB, in {plan.peak_moment};"
        f" {plan.budget_bytes / 1e9:.2f} GB are there (recomputation: {plan.settings.level})"
    )
    return said + (f"; {describe_pages(plan)}" if plan.fits and plan.peak_bytes > plan.budget_bytes else "")


def describe_pages(plan: Plan) -> str:
    """What becomes of a run that is larger than its budget, and fits."""
    pages = plan.peak_bytes - plan.least_bytes
    return f"{pages / 1e9:.2f} GB of it are pages of files, which leave when memory is short" + (
        " and are read again in every step" if not plan.stays else ""
    )


def describe_changes(changes: dict[str, str]) -> str:
    """`--optim adamw_8bit --max_length 512`"""
    return " ".join(f"--{key} {value}" for key, value in changes.items())


def check_fits(plan: Plan, max_memory: str | None) -> None:
    """Raises HalfbyteError, with the way out, for a plan that does not fit its budget."""
    if plan.fits:
        return
    whose = f"max_memory is {max_memory}" if max_memory else f"{_gigabytes(plan.budget_bytes)} are there for it"
    advice = advise(plan)
    by_changes = f"it fits with {describe_changes(advice.changes)}, or as it is" if advice else "it fits"
    raise HalfbyteError(
        f"the run takes {_gigabytes(plan.least_bytes)} of memory and {whose}: {by_changes} with a max_memory of"
        f" {_gigabytes(smallest_budget(plan))}; over_budget: try begins it all the same."
    )


def _gigabytes(size: int) -> str:
    """Rounded up, so that what is asked for is enough."""
    return f"{math.ceil(size / 1e7) / 100:.2f}GB"


def _rows(asked: int, examples: Sequence[Example]) -> int:
    return min(asked, len(examples)) if examples else asked


def _longest(examples: Sequence[Example], max_length: int) -> int:
    """Tokens of the longest row; of one of max_length where no rows are known."""
    return int(lengths_of(examples).max()) if examples else max_length
