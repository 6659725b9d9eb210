"""A halfbyte model ready to train, as `halfbyte finetune` makes one; shared by halfbyte's workers."""

import importlib
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import halfbyte as hb
from halfbyte.huggingface.generate import generate_texts


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
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


def write_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> list[int]:
    """The ids that `halfbyte generate` writes after a prompt: as many as asked for, for nothing ends them early."""
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    written: list[list[int]] = []
    # The ids are not returned, but they are decoded on the way out.
    tokenizer.decode = lambda ids, **_: written.append(ids.tolist()) or ""
    try:
        generate_texts(model, tokenizer, [prompt], new_tokens)
    finally:
        del tokenizer.decode
    ids = written[-1]
    if len(ids) != new_tokens:
        raise ValueError(f"{len(ids)} tokens were written where {new_tokens} were asked for")
    return ids


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
