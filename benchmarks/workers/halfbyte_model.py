"""A halfbyte model ready to train, as `halfbyte finetune` makes one; shared by halfbyte's workers."""

import importlib
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import halfbyte as hb


def load(settings: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, on as many threads as `settings` say; they may change how it is loaded."""
    torch.set_num_threads(settings["threads"])
    model, tokenizer = hb.load_model(
        settings["model"],
        quant_type=settings.get("quant_type", "nf4"),
        compute_dtype=getattr(torch, settings.get("dtype", "bfloat16")),
        fast=settings.get("fast", True),
    )
    return model, tokenizer


def put_adapters_on(model: PreTrainedModel, seed: int = 0) -> PeftModel:
    """LoRA of rank 16 on every linear layer. The same seed gives the same first adapters."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return hb.add_lora(model, config)


def set_checkpointing(model: PeftModel, wanted: bool) -> None:
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def executed() -> str | None:
    """The implementation whose kernels ran last, by the word of the table that chose it."""
    ops: Any = importlib.import_module("halfbyte.ops")
    return ops.executed_implementation()


def supervise_all(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of whole rows without padding, its loss over every position, as transformers' `labels=input_ids`."""
    rows, length = ids.shape
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length).expand(rows, length).contiguous(),
        "labels": ids.clone(),
    }
