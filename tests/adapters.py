"""LoRA adapters of random numbers, as PEFT saves them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel


def random_adapter(model: PreTrainedModel, directory: Path, **settings: Any) -> Path:
    """An adapter whose every tensor is random, as PEFT saves it."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**values))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                is_whole = "modules_to_save" in name or "magnitude" in name or "trainable_tokens" in name
                parameter.copy_(parameter + noise if is_whole else noise)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory
