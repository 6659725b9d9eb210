"""4-bit checkpoints against bitsandbytes' own, live: theirs open here, ours open there, with equal weights."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
from halfbyte import Linear4bit, QuantizationConfig, add_lora
from halfbyte.checkpoint.adapter import save_adapter
from halfbyte.recipes.quantize import quantize
from models import build_tokenizer, save_model

# What it puts in the place of a model's own operations is test_patch.py's matter.
load_model = partial(halfbyte.load_model, fast=False)

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers" / "bin" / "python"

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no environment with bitsandbytes at {PEER}: make peers")

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
OURS = [("llama", *kind) for kind in KINDS] + [("gpt2", "nf4", True), ("qwen2", "nf4", True), ("phi3", "fp4", False)]
THEIRS = [(*ours, "uint8") for ours in OURS] + [("llama", "nf4", True, "bfloat16")]


def name_of(*settings: object) -> str:
    return "-".join(map(str, settings))


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which our checkpoints were read and theirs were written, by one process with bitsandbytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peer")
    save_file({"input_ids": torch.arange(18).view(2, 9) * 7 % 256}, folder / "input_ids")
    weights = {f"{dtype} {rows}": torch.randn(rows, 192).to(dtype) for rows in (96, 512) for dtype in DTYPES}
    save_file(weights, folder / "weights")

    for model_type in {ours[0] for ours in OURS}:
        # bitsandbytes' CPU kernels want whole blocks in a row.
        save_model(folder / model_type, model_type, hidden_size=64, intermediate_size=128, head_dim=16)

    def job(name: str, **job: Any) -> Path:
        (folder / name).mkdir()
        (folder / name / "job").write_text(json.dumps(job))
        return folder / name

    for quant_type, double_quant in KINDS:
        name = name_of("layer", quant_type, double_quant)
        job(name, do="layer", quant_type=quant_type, double_quant=double_quant, storage="uint8")
    for model_type, quant_type, double_quant in OURS:
        where = job(name_of("ours", model_type, quant_type, double_quant), do="read")
        quantize(str(folder / model_type), str(where / "model"), quant_type=quant_type, double_quant=double_quant)
        if (quant_type, double_quant) == ("nf4", True):
            save_adapter(build_adapter(load_model(str(where / "model"))[0]), where / "adapter")
    for model_type, quant_type, double_quant, storage in THEIRS:
        settings = {"quant_type": quant_type, "double_quant": double_quant, "storage": storage}
        where = job(name_of("theirs", model_type, *settings.values()), do="write", **settings)
        shutil.copytree(folder / model_type, where / "original")
    command = [str(PEER), str(Path(__file__).with_name("peer.py")), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr
    return folder


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build_adapter(model: PreTrainedModel) -> nn.Module:
    torch.manual_seed(1)
    return add_lora(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return {name: layer.quantized.dequantize().float() for name, layer in layers.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def state_of(state: dict[str, Tensor]) -> dict[str, Any]:
    (key,) = [key for key in state if "quant_state" in key]
    return json.loads(bytes(state[key].tolist()))  # type: ignore[no-any-return]


# ── A layer ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_the_state_dict_of_a_layer(exchange: Path, quant_type: str, double_quant: bool) -> None:
    folder = exchange / name_of("layer", quant_type, double_quant)
    states, values = load_file(folder / "states"), load_file(folder / "dequantized")
    for name, weight in load_file(exchange / "weights").items():
        theirs = {key.removeprefix(f"{name}|"): t for key, t in states.items() if key.startswith(f"{name}|")}
        linear = nn.Linear(192, len(weight), bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        ours = dict(Linear4bit.from_linear(linear, quant_type, 64, double_quant).state_dict())
        assert {key: (t.dtype, t.shape) for key, t in ours.items() if "quant_state" not in key} == {
            key: (t.dtype, t.shape) for key, t in theirs.items() if "quant_state" not in key
        }
        assert list(state_of(ours)) == list(state_of(theirs))
        if double_quant:
            # Their 8-bit encoder is approximate and their mean is summed in float32: the rest is equal.
            ours_offset, theirs_offset = (state_of(state)["nested_offset"] for state in (ours, theirs))
            assert ours_offset == pytest.approx(theirs_offset, rel=1e-6)
            keys = ["weight", "weight.quant_map", "weight.nested_quant_map"]
            assert_equal({key: ours[key] for key in keys}, {key: theirs[key] for key in keys})
            codes = ours["weight.absmax"].int() - theirs["weight.absmax"].int()
            assert codes.abs().max() <= 1
            assert (codes != 0).float().mean() < 0.02
        else:
            assert_equal(ours, theirs)  # to the last byte, the quantization state's text included
        read = Linear4bit(192, len(weight))
        assert read.load_state_dict(theirs).unexpected_keys == []
        assert torch.equal(read.quantized.dequantize().float(), values[name])
        assert_equal(dict(read.state_dict()), theirs)


# ── Ours, there ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("model_type", "quant_type", "double_quant"), OURS)
def test_our_checkpoint_opens_in_bitsandbytes(
    exchange: Path, model_type: str, quant_type: str, double_quant: bool
) -> None:
    folder = exchange / name_of("ours", model_type, quant_type, double_quant)
    model, _ = load_model(str(folder / "model"))
    assert_equal(weights_of(model), load_file(folder / "dequantized"))
    theirs = load_file(folder / "logits")["logits"]
    if (folder / "adapter").exists():
        model = build_adapter(model)
    with torch.no_grad():
        ours = model(load_file(exchange / "input_ids")["input_ids"]).logits.float()
    # 16-bit products in another order, twice over two blocks.
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


# ── Theirs, here ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("model_type", "quant_type", "double_quant", "storage"), THEIRS)
def test_their_checkpoint_opens_here_and_is_saved_again_byte_for_byte(
    exchange: Path, tmp_path: Path, model_type: str, quant_type: str, double_quant: bool, storage: str
) -> None:
    folder = exchange / name_of("theirs", model_type, quant_type, double_quant, storage)
    build_tokenizer().save_pretrained(folder / "model")
    model, _ = load_model(str(folder / "model"))
    assert_equal(weights_of(model), load_file(folder / "dequantized"))
    layer = next(module for module in model.modules() if isinstance(module, Linear4bit))
    assert (layer.quant_type, layer.double_quant) == (quant_type, double_quant)

    assert_saved_as_theirs(model, folder, tmp_path)


@pytest.mark.parametrize(("model_type", "quant_type", "double_quant", "storage"), THEIRS)
def test_their_checkpoint_opens_by_from_pretrained_and_is_saved_again_byte_for_byte(
    exchange: Path, tmp_path: Path, model_type: str, quant_type: str, double_quant: bool, storage: str
) -> None:
    folder = exchange / name_of("theirs", model_type, quant_type, double_quant, storage)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=QuantizationConfig(fast=False))
    assert_equal(weights_of(model), load_file(folder / "dequantized"))
    assert_saved_as_theirs(model, folder, tmp_path)


def assert_saved_as_theirs(model: PreTrainedModel, folder: Path, directory: Path) -> None:
    model.save_pretrained(directory)
    theirs = load_file(folder / "model" / "model.safetensors")
    ours = load_file(directory / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        their = theirs[name]
        if their.dtype != tensor.dtype:  # the codes, whose bytes were stored as 16-bit numbers
            their = their.flatten().view(torch.uint8).view(-1, 1)
        assert torch.equal(tensor, their), name
    saved, original = (
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (directory, folder / "model")
    )
    for key in ("quant_method", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        assert saved[key] == original[key]
