"""Merging mixtures: the experts that training had in 4 bits, adapters on them, and files as their base's."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
from adapters import random_adapter
from halfbyte import HalfbyteError, load_model
from halfbyte.checkpoint.merge import Settings, merge_weights
from halfbyte.huggingface.adapter_changes import AdapterFile, find_changes
from halfbyte.huggingface.base_weights import open_base
from halfbyte.huggingface.peft import load_adapter
from halfbyte.huggingface.quantizer import QuantizationConfig
from halfbyte.nn import Experts4bit
from halfbyte.quant import to_keys
from halfbyte.recipes.quantize import quantize
from models import save_model

IDS = torch.arange(24).reshape(2, 12)
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# What PEFT says of its own names for experts.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")


def plain(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def adapter_on_experts(base: Path, directory: Path, **settings: Any) -> Path:
    values = {"target_modules": ["q_proj"], "target_parameters": BOTH, "lora_dropout": 0.0} | settings
    return random_adapter(plain(base), directory, **values)


@pytest.fixture(params=MIXTURES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    more: dict[str, Any] = {}
    if request.param == "qwen2_moe":
        more = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    return save_model(tmp_path / "base", request.param, **more)


@pytest.fixture
def in_4_bits(base: Path, tmp_path: Path) -> Path:
    """The base as a 4-bit checkpoint: its experts are codes of the whole parameter there."""
    quantize(str(base), str(tmp_path / "4bit"))
    return tmp_path / "4bit"


@pytest.mark.parametrize("form", ["16-bit", "4-bit"])
def test_an_adapter_on_experts_gives_its_own_logits(base: Path, tmp_path: Path, form: str) -> None:
    directory = base
    if form == "4-bit":
        directory = tmp_path / "4bit"
        quantize(str(base), str(directory), compute_dtype="float32")
    adapter = adapter_on_experts(base, tmp_path / "adapter")
    trained, _ = load_model(str(directory), compute_dtype=torch.float32, fast=False)
    before = logits(trained)
    expected = logits(load_adapter(trained, adapter))
    keys = {"compute_dtype": "float32", "dtype": "float32"}
    halfbyte.merge(str(directory), str(adapter), str(tmp_path / "out"), base="quantized", **keys)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=2e-3, atol=2e-3)
    assert (expected - before).abs().max() > 0.05, "the adapter changes nothing, so nothing was tested"
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(base)
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_onto_the_original_it_is_what_peft_computes(base: Path, tmp_path: Path) -> None:
    adapter = adapter_on_experts(base, tmp_path / "adapter", use_rslora=True)
    halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"), base="original", dtype="float32")
    expected = logits(PeftModel.from_pretrained(plain(base), adapter))
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_changed_has_the_bits_of_the_files(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(plain(base), tmp_path / "adapter", target_modules=["q_proj"])
    halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"), base="original")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(base)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) == ("q_proj.weight" not in name), name


@pytest.mark.parametrize("form", ["16-bit", "4-bit"])
def test_4_bits_are_written_as_a_loaded_model_saves_them(
    base: Path, in_4_bits: Path, tmp_path: Path, form: str
) -> None:
    adapter = random_adapter(plain(base), tmp_path / "adapter", target_modules=["q_proj"])
    directory, onto = (base, "original") if form == "16-bit" else (in_4_bits, "quantized")
    halfbyte.merge(str(directory), str(adapter), str(tmp_path / "out"), base=onto, dtype="nf4")
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(in_4_bits)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("experts.down_proj.nested_absmax") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "q_proj" not in name)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", in_4_bits)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["quantization_config"]["halfbyte_experts_4bit"] is True


def test_4_bits_are_one_quantization_of_the_sum(base: Path, tmp_path: Path) -> None:
    adapters = [adapter_on_experts(base, tmp_path / name, r=rank) for name, rank in (("a", 2), ("b", 4))]
    names = [str(adapter) for adapter in adapters]
    halfbyte.merge(str(base), names, str(tmp_path / "out"), base="original", dtype="nf4", weights=[0.5, 2.0])
    merged, _ = load_model(str(tmp_path / "out"))
    wide = plain(base)
    for adapter, scale in zip(adapters, (0.5, 2.0), strict=True):
        adapted = PeftModel.from_pretrained(plain(base), adapter)
        for name, module in adapted.get_base_model().named_modules():
            if hasattr(module, "parameter_name"):
                weight = wide.get_parameter(f"{name.replace('.base_layer', '')}.{module.parameter_name}")
                weight.data += scale * module.get_delta_weight("default")
    experts = {name: module for name, module in merged.named_modules() if isinstance(module, Experts4bit)}
    assert len(experts) == 2
    for name, module in experts.items():
        for leaf, quantized in module.all_quantized.items():
            expected = halfbyte.quantize_4bit(wide.get_parameter(f"{name}.{leaf}").data)
            # A sum in another order, near a midpoint.
            assert (quantized.packed != expected.packed).float().mean() < 0.01


def test_what_sparse_sums_are_made_of_is_pefts(base: Path, tmp_path: Path) -> None:
    adapter = adapter_on_experts(base, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(plain(base), adapter)
    wrappers = {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in adapted.get_base_model().named_modules()
        if hasattr(module, "parameter_name")
    }
    opened = open_base(str(base), None)
    changes = find_changes(opened.model, "base", AdapterFile(adapter), 0.5)
    assert len(wrappers) == 4
    for name, module in wrappers.items():
        change, expected = changes[name], module.get_delta_weight("default").detach()
        weight = torch.zeros_like(expected)
        change.add_to(weight)
        torch.testing.assert_close(weight, 0.5 * expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(change.delta(weight) * 2, expected, rtol=1e-5, atol=1e-6)  # alpha is twice the rank


def test_a_fingerprint_is_another_when_one_expert_is(base: Path, tmp_path: Path) -> None:
    def fingerprint(directory: Path) -> str | None:
        opened = open_base(str(directory), QuantizationConfig())
        return merge_weights(opened, {}, tmp_path, Settings("original")).base_sha256

    before = fingerprint(base)
    shutil.copytree(base, tmp_path / "changed")
    tensors = tensors_of(tmp_path / "changed")
    name = next(name for name in sorted(tensors, reverse=True) if ".experts." in name and "bias" not in name)
    tensors[name].view(-1)[5] += 1
    save_file(tensors, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    assert before not in (None, fingerprint(tmp_path / "changed"))


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "mixtral")
    adapter = adapter_on_experts(base, tmp_path / "adapter")
    tensors = tensors_of(base)
    name = next(name for name in tensors if ".experts.2." in name)
    del tensors[name]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(HalfbyteError, match=rf"base lacks 1 of the model's tensors, among them {re.escape(name)}\.$"):
        halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "mixtral", tie_word_embeddings=True)
    short = {name.removeprefix("model."): tensor for name, tensor in tensors_of(base).items()}
    save_file(short, base / "model.safetensors", {"format": "pt"})
    adapter = adapter_on_experts(base, tmp_path / "adapter")
    halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"), base="original", dtype="float32")
    expected = logits(PeftModel.from_pretrained(plain(base), adapter))
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    assert tensors_of(tmp_path / "out").keys() == short.keys()


def test_experts_that_are_codes_one_by_one(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "mixtral")
    adapter = adapter_on_experts(base, tmp_path / "adapter")
    tensors = tensors_of(base)
    name = next(name for name in tensors if ".experts.0.w1." in name)
    quantized = halfbyte.quantize_4bit(tensors[name])
    tensors |= {name: quantized.packed} | {f"{name}.{key}": tensor for key, tensor in to_keys(quantized).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig(experts=True).to_dict()
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(HalfbyteError, match=rf"{re.escape(name)} is in 4 bits and is a part of a parameter"):
        halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"))


def test_a_mixture_is_not_written_as_gguf(base: Path, tmp_path: Path) -> None:
    adapter = adapter_on_experts(base, tmp_path / "adapter")
    with pytest.raises(HalfbyteError, match=r"base is a model of the type '\w+', which is not written as GGUF; .*\.$"):
        halfbyte.merge(str(base), str(adapter), str(tmp_path / "out.gguf"), format="gguf")
    assert not (tmp_path / "out.gguf").exists()
