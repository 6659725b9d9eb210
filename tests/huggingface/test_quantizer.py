"""QuantizationConfig in transformers' own from_pretrained, and what stands in config.json afterwards."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import HalfbyteError, Linear4bit, QuantizationConfig
from models import build_tokenizer

# What it puts in the place of a model's own operations is test_patch.py's matter.
load_model = partial(halfbyte.load_model, fast=False)


def names_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.fixture
def source(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


def test_from_pretrained_gives_what_load_model_gives(source: Path) -> None:
    config = QuantizationConfig("fp4", 128, double_quant=False, compute_dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    ours, _ = load_model(str(source), "fp4", 128, False, torch.float32)
    states = theirs.state_dict(), ours.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert theirs.is_quantized


def test_config_json_speaks_bitsandbytes(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(source), "fp4", double_quant=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }


def test_modules_to_skip_come_on_top_of_the_output_layer_and_are_written_down(source: Path, tmp_path: Path) -> None:
    config = QuantizationConfig(skip_modules=["q_proj", "model.layers.1"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    others = {"self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    others |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert names_of(model) == {f"model.layers.0.{name}" for name in others}
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path))
    assert names_of(again) == names_of(model)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(saved["llm_int8_skip_modules"]) == {"lm_head", "q_proj", "model.layers.1"}


def test_tied_weights_stay_in_16_bits(model_directory: Callable[[str], Path]) -> None:
    model, _ = load_model(str(model_directory("qwen2")))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not isinstance(model.lm_head, Linear4bit)


def test_what_is_saved_is_half_a_byte_a_weight_and_nothing_else_changes(source: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(source))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    saved = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    original = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    quantized = {f"{name}.weight" for name in names_of(model)}
    assert {name for name in saved if ".weight." not in name} == original.keys()
    for name, tensor in original.items():
        if name in quantized:
            assert saved[name].nbytes == tensor.numel() / 2
        else:
            assert torch.equal(saved[name], tensor)
    build_tokenizer().save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path))  # from several shards
    assert names_of(again) == names_of(model)


def test_a_model_that_was_saved_can_be_saved_again(source: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(source))
    for generation in ("one", "two"):
        model.save_pretrained(tmp_path / generation)
        tokenizer.save_pretrained(tmp_path / generation)
        model, tokenizer = load_model(str(tmp_path / generation))
    one, two = (load_file(tmp_path / generation / "model.safetensors") for generation in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"quant_method": "gptq", "load_in_4bit": True}, "gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes"),
        ({}, "None"),
    ],
)
def test_other_quantizations_are_refused(saved: dict[str, Any], told: str) -> None:
    with pytest.raises(HalfbyteError, match=told):
        QuantizationConfig.from_bitsandbytes(saved, torch.bfloat16)


def test_bitsandbytes_defaults_are_bitsandbytes_own() -> None:
    config = QuantizationConfig.from_bitsandbytes({"load_in_4bit": True}, torch.float32)
    assert (config.quant_type, config.double_quant, config.skip_modules) == ("fp4", False, None)
    assert config.compute_dtype == torch.float32


def test_a_nan_does_not_load_through_transformers_either(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, HalfbyteError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantizationConfig())
