"""Today's usual stack, as its own documents show it: transformers + bitsandbytes + PEFT; for the peers' workers."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def load(settings: dict[str, Any]) -> PreTrainedModel:
    """In 4 bits (NF4, double quantization, bf16 products), or in bf16 where `quantize` is false."""
    torch.set_num_threads(settings["threads"])
    return from_pretrained(settings["model"], settings.get("quantize", True))


def from_pretrained(path: str, quantize: bool) -> PreTrainedModel:
    if not quantize:  # no quantization_config at all: None would overrule the one that a 4-bit checkpoint brings
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=four_bits)


def put_adapters_on(model: PreTrainedModel, autocast: bool) -> PeftModel:
    """LoRA of rank 16 on every linear layer: float32 adapters under autocast, bf16 adapters without."""
    torch.manual_seed(0)
    model.enable_input_require_grads()
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    model.config.use_cache = False
    return model
