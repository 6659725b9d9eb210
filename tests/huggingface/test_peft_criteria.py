"""What PEFT's own tests of 4-bit bases ask of merging, in probabilities and with their tolerances."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte import QuantizationConfig
from halfbyte.huggingface.peft import LoraLinear4bit

INPUT_IDS = torch.tensor([[1, 0, 1, 0, 1, 0]])


def in_4_bits(source: Path, double_quant: bool = False) -> PreTrainedModel:
    config = QuantizationConfig(double_quant=double_quant, compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32).eval()


@torch.no_grad()
def probabilities(model: nn.Module) -> Tensor:
    return model(INPUT_IDS).logits.softmax(-1)


def test_a_merged_adapter_on_the_real_model(smollm2_directory: Path) -> None:
    near: dict[str, Any] = {"atol": 0.01, "rtol": 10}
    torch.manual_seed(3000)
    model = in_4_bits(smollm2_directory)
    base = probabilities(model)
    # On every layer and no stronger: an adapter of random numbers is moved by being rounded to 4 bits, as the base is.
    lora = LoraConfig(r=8, lora_alpha=8, init_lora_weights=False, target_modules="all-linear")
    adapted = get_peft_model(model, lora)
    before = probabilities(adapted)
    assert not torch.allclose(base, before, **near)
    adapted.merge_adapter()
    merged = probabilities(adapted)
    assert torch.allclose(before, merged, **near)
    with adapted.disable_adapter():
        assert torch.equal(base, probabilities(adapted))
    assert torch.equal(merged, probabilities(adapted.merge_and_unload()))


@pytest.mark.parametrize("double_quant", [False, True])
def test_merged_dora_on_a_small_random_model(tmp_path: Path, double_quant: bool) -> None:
    near: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-3}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, double_quant)
    base = probabilities(model)
    lora = LoraConfig(r=8, init_lora_weights=False, use_dora=True, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, lora).eval()
    for layer in adapted.modules():
        if isinstance(layer, LoraLinear4bit):
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.data = 10 * torch.rand_like(magnitude)
    before = probabilities(adapted)
    adapted.merge_adapter()
    merged = probabilities(adapted)
    adapted.unmerge_adapter()
    after = probabilities(adapted)
    unloaded = probabilities(adapted.merge_and_unload())
    assert not torch.allclose(base, before, **near)
    assert torch.equal(before, after)
    assert torch.allclose(before, merged, **near)
    assert torch.equal(merged, unloaded)
