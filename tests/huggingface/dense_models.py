"""What adapters on 4-bit models are compared with: PEFT on a dense model of the same weights."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.nn import PackedWeights
from models import VOCABULARY_SIZE

INPUT_IDS = torch.arange(2 * 9).view(2, 9) * 7 % (VOCABULARY_SIZE - 3)


def settings(**changes: Any) -> LoraConfig:
    """LoRA whose B is not zero, so that it does something from the first step."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return LoraConfig(task_type="CAUSAL_LM", **values)


def dense_base(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the dequantized weights and no trace of 4 bits."""
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeights):
            for own, quantized in module.all_quantized.items():
                weight = quantized.dequantize(torch.float32)
                state[f"{name}.{own}"] = weight.T if isinstance(dense.get_submodule(name), Conv1D) else weight
    others = {name: t for name, t in model.state_dict().items() if name in dense.state_dict() and name not in state}
    dense.load_state_dict(others | state)
    return dense.eval()


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(INPUT_IDS).logits
    return result
