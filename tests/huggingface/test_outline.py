"""An outline of a model counts, without its weights, what the loaded model holds; miniatures measure what it keeps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig

from halfbyte import HalfbyteError, add_lora, load_model
from halfbyte.huggingface import miniature
from halfbyte.huggingface.mapped import mapped_bytes
from halfbyte.huggingface.miniature import make_miniatures, predict_activation_bytes, time_pass
from halfbyte.huggingface.outline import Inventory, count_mapped_bytes, kinds_of_layers, outline_model, take_inventory
from halfbyte.huggingface.recompute import LEVELS, measure_activation_bytes
from halfbyte.nn import Linear4bit
from halfbyte.recipes.quantize import quantize
from models import ARCHITECTURES, save_model


def lora() -> LoraConfig:
    """A new one: PEFT writes the model's name into what it is given."""
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def held_by(model: Any) -> dict[str, Any]:
    """Counted on a real model, by its own tensors: bytes in 4 bits and beside them, values of each trained tensor."""
    codes = [module for module in model.modules() if isinstance(module, Linear4bit)]
    in_4_bits = {id(t) for layer in codes for t in (layer.weight, layer.absmax, layer.nested_absmax)}
    rest = {
        tensor.data_ptr(): tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in in_4_bits and not tensor.requires_grad
    }
    return {
        "quantized_bytes": sum(layer.quantized.nbytes for layer in codes),
        "quantized_parameters": sum(layer.quantized.shape.numel() for layer in codes),
        "remainder_bytes": sum(rest.values()),
        "adapter_sizes": tuple(p.numel() for p in model.parameters() if p.requires_grad),
    }


def compare(inventory: Inventory, held: dict[str, Any]) -> None:
    assert {key: getattr(inventory, key) for key in held} == held


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_inventory_is_what_the_loaded_model_holds_to_the_byte(
    model_directory: Callable[[str], Path], model_type: str
) -> None:
    directory = str(model_directory(model_type))
    held = held_by(add_lora(load_model(directory)[0], lora()))
    assert held["quantized_bytes"] > 0
    compare(take_inventory(outline_model(directory, lora())), held)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 32},
        {"double_quant": False, "quant_type": "fp4"},
        {"quant_type": "none"},
        {"compute_dtype": torch.float32},
    ],
    ids=str,
)
def test_so_it_is_however_it_is_loaded(model_directory: Callable[[str], Path], settings: dict[str, Any]) -> None:
    directory = str(model_directory("qwen2"))
    held = held_by(add_lora(load_model(directory, **settings)[0], lora()))
    compare(take_inventory(outline_model(directory, lora(), **settings)), held)


def test_the_real_model(smollm2_gguf: Path) -> None:
    held = held_by(add_lora(load_model(str(smollm2_gguf))[0], lora()))
    assert held["quantized_parameters"] == 106_168_320
    inventory = take_inventory(outline_model(str(smollm2_gguf), lora()))
    compare(inventory, held)
    assert inventory.parameters == 134_515_008  # as its page says: the output layer is the embedding


def test_a_config_is_enough(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    whole = model_directory("llama")
    shutil.copy(whole / "config.json", tmp_path)
    assert take_inventory(outline_model(str(tmp_path), lora())) == take_inventory(outline_model(str(whole), lora()))


def write_config(directory: Path, model_type: str = "llama", **sizes: Any) -> str:
    AutoConfig.for_model(model_type, **sizes).save_pretrained(directory)
    return str(directory)


LLAMA_65B = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}


def test_a_model_larger_than_the_machine(tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    inventory = take_inventory(outline_model(write_config(tmp_path, **LLAMA_65B), lora()))
    assert inventory.parameters == 65_285_660_672
    layers = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    assert inventory.quantized_parameters == layers
    # Each weight is a multiple of the blocks, so that of the 4.127 bits a value only the offsets are to be added.
    assert inventory.quantized_bytes == layers * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 4 * 80 * 7
    assert psutil.Process().memory_info().rss - before < 200e6


# Of such sizes that some codes and absmax are mapped and some are read.
LARGER = {"hidden_size": 256, "intermediate_size": 2100, "head_dim": 64}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_what_is_mapped_is_known_before_to_the_byte(tmp_path: Path, model_type: str, double_quant: bool) -> None:
    source, directory = save_model(tmp_path / "16-bit", model_type, **LARGER), tmp_path / "4-bit"
    quantize(str(source), str(directory), double_quant=double_quant)
    outline = outline_model(str(directory), lora())
    expected = mapped_bytes(load_model(str(directory), fast=False)[0])
    assert count_mapped_bytes(str(directory), outline) == expected > 0
    assert count_mapped_bytes(str(source), outline_model(str(source), lora())) == 0


def test_a_model_holds_what_lies_on_disk_and_what_was_planned(smollm2_directory: Path, tmp_path: Path) -> None:
    quantize(str(smollm2_directory), str(tmp_path / "4-bit"))
    saved = load_file(tmp_path / "4-bit" / "model.safetensors")
    names = [name.removesuffix(".absmax") for name in saved if name.endswith(".weight.absmax")]
    # The offset is 4 bytes in memory and stands in the text of quant_state; the codebooks are the format's.
    on_disk = sum(saved[name + suffix].nbytes for name in names for suffix in ("", ".absmax", ".nested_absmax"))
    model, _ = load_model(str(tmp_path / "4-bit"), fast=False)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    held = sum(layer.quantized.nbytes for layer in layers)
    assert len(layers) == len(names) == 210
    assert held == on_disk + 4 * len(names)
    assert held == take_inventory(outline_model(str(tmp_path / "4-bit"), lora())).quantized_bytes
    assert held == take_inventory(outline_model(str(smollm2_directory), lora())).quantized_bytes


def test_what_is_not_in_the_model_is_told_as_it_is_when_it_is_loaded(model_directory: Callable[[str], Path]) -> None:
    nowhere = LoraConfig(target_modules=["nothing"], task_type="CAUSAL_LM")
    with pytest.raises(HalfbyteError, match="target_modules does not fit the model"):
        outline_model(str(model_directory("llama")), nowhere)


def test_kinds_of_layers(model_directory: Callable[[str], Path]) -> None:
    assert kinds_of_layers(outline_model(str(model_directory("llama")), lora())) == [[0, 1]]
    assert kinds_of_layers(outline_model(str(model_directory("gemma2")), lora())) == [[0], [1]]
    first_only = LoraConfig(r=2, target_modules=r".*layers\.0\..*q_proj", task_type="CAUSAL_LM")
    assert kinds_of_layers(outline_model(str(model_directory("llama")), first_only)) == [[0], [1]]


# ── Miniatures ───────────────────────────────────────────────────────────────────────────────────────────────────────

SLIDING = ["sliding_attention", "full_attention"] * 3


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gpt2", {}),
        ("phi3", {}),
        ("falcon", {}),
        ("gpt_neox", {}),
        ("gemma2", {"layer_types": SLIDING}),
    ],
)
def test_miniatures_measure_what_the_model_does(
    tmp_path: Path, model_type: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six layers one and two are run."""
    monkeypatch.setattr(miniature, "_MOST_LAYERS", 1)
    directory = str(save_model(tmp_path, model_type, num_hidden_layers=6, **settings))
    expected = measure_activation_bytes(add_lora(load_model(directory)[0], lora()))
    predicted = predict_activation_bytes(make_miniatures(outline_model(directory, lora())), 6)
    assert predicted.keys() == expected.keys()
    assert predicted == pytest.approx(expected, rel=1e-3)


def test_a_miniature_takes_no_memory_of_the_weights(tmp_path: Path) -> None:
    """One layer here is 0.3 GB in 4 bits, the embedding 0.5 GB."""
    sizes = {**LLAMA_65B, "num_hidden_layers": 3, "intermediate_size": 16384}
    outline = outline_model(write_config(tmp_path, **sizes), lora())
    before = psutil.Process().memory_info().rss
    family = make_miniatures(outline)
    assert len(family.longer) == 1
    assert psutil.Process().memory_info().rss - before < 150e6


def test_a_miniature_has_the_attention_and_the_kernels_of_the_model(model_directory: Callable[[str], Path]) -> None:
    directory = str(model_directory("llama"))
    real = add_lora(load_model(directory)[0], lora())
    shortest = make_miniatures(outline_model(directory, lora())).shortest
    of_real, of_miniature = (
        {r.name: r.status for r in getattr(model.get_base_model(), "halfbyte_replacements")}  # noqa: B009
        for model in (real, shortest)
    )
    assert of_miniature == of_real
    assert shortest.config._attn_implementation == real.config._attn_implementation == "halfbyte"


def test_a_pass_is_timed_and_the_time_is_kept(model_directory: Callable[[str], Path]) -> None:
    family = make_miniatures(outline_model(str(model_directory("llama")), lora()))
    took = time_pass(family, "none", rows=2, length=32, seconds=0.3)
    assert 0 < took["pass"] < 10
    assert 0 < took["update"] < 1e-3


def test_the_levels_are_those_of_the_arithmetic() -> None:
    from halfbyte import plan

    assert plan.LEVELS == LEVELS


def test_a_4_bit_checkpoint_keeps_its_own_type(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    load_model(str(model_directory("llama")), quant_type="fp4", double_quant=False)[0].save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    plain = outline_model(str(model_directory("llama")), lora(), quant_type="fp4", double_quant=False)
    assert take_inventory(outline_model(str(tmp_path), lora())) == take_inventory(plain)
