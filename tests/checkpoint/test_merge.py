"""Merging: against PEFT's own merge, the adapter on its 4-bit base, and every way in which it must refuse."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
import halfbyte.checkpoint.merge
from adapters import random_adapter
from halfbyte import load_model
from halfbyte.checkpoint.adapter import save_adapter
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.checkpoint.merge import Settings, merge_weights
from halfbyte.checkpoint.shards import ShardWriter
from halfbyte.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from halfbyte.huggingface.base_weights import open_base
from halfbyte.huggingface.peft import load_adapter
from halfbyte.huggingface.quantizer import QuantizationConfig
from halfbyte.nn import Linear4bit
from halfbyte.recipes.quantize import quantize
from models import ARCHITECTURES, save_gguf, save_model

PEER = Path(__file__).resolve().parents[2] / ".peers" / "bin" / "python"
IDS = torch.arange(24).reshape(2, 12)


def plain(directory: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


@pytest.fixture
def base(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_what_peft_merges(tmp_path: Path, variant: str, tied: bool) -> None:
    bias = {"attention_bias": True} if variant == "lora_bias" else {}
    directory = save_model(tmp_path / "base", max_shard_size="40KB", tie_word_embeddings=tied, **bias)
    adapter = random_adapter(plain(directory, torch.float32), tmp_path / "adapter", **VARIANTS[variant])
    halfbyte.merge(str(directory), str(adapter), str(tmp_path / "out"), base="original", dtype="float32")
    ours = plain(tmp_path / "out", torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain(directory, torch.float32), adapter).eval()(IDS).logits
        found = ours(IDS).logits
        before = plain(directory, torch.float32)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.05, "the adapter changes nothing, so nothing was tested"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_onto_the_weights_that_training_saw(tmp_path: Path, model_type: str) -> None:
    directory = save_model(tmp_path / "base", model_type)
    trained, _ = load_model(str(directory), compute_dtype=torch.float32, fast=False)
    adapted = halfbyte.add_lora(trained, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_adapter(adapted, tmp_path / "adapter")
    keys = {"compute_dtype": "float32", "dtype": "float32", "base": "quantized"}
    halfbyte.merge(str(directory), str(tmp_path / "adapter"), str(tmp_path / "out"), **keys)
    with torch.no_grad():
        expected, found = adapted.eval()(IDS).logits, plain(tmp_path / "out", torch.float32)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("form", ["16-bit", "4-bit"])
def test_the_fingerprint_is_that_of_a_load(tmp_path: Path, model_type: str, form: str) -> None:
    directory = save_model(tmp_path / "base", model_type)
    loaded, tokenizer = load_model(str(directory))
    if form == "4-bit":
        loaded.save_pretrained(tmp_path / "4bit")
        tokenizer.save_pretrained(tmp_path / "4bit")
        directory = tmp_path / "4bit"
    base = open_base(str(directory), QuantizationConfig())
    written = merge_weights(base, {}, tmp_path, Settings("quantized"))
    assert written.base_sha256 == weights_sha256(loaded)


def test_the_fingerprint_of_a_gguf_is_that_of_a_load(tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", "Q8_0")
    loaded, _ = load_model(str(tmp_path / "model.gguf"))
    base = open_base(str(tmp_path / "model.gguf"), QuantizationConfig())
    assert merge_weights(base, {}, tmp_path, Settings("quantized")).base_sha256 == weights_sha256(loaded)


def test_a_fingerprint_is_another_when_one_weight_is(base: Path, tmp_path: Path) -> None:
    before = merge_weights(open_base(str(base), QuantizationConfig()), {}, tmp_path, Settings("original")).base_sha256
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    shard = sorted(changed.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[5] += 1
    save_file(tensors, shard, {"format": "pt"})
    after = merge_weights(open_base(str(changed), QuantizationConfig()), {}, tmp_path, Settings("original"))
    assert before not in (None, after.base_sha256)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_layers_that_are_one_tensor_of_the_files(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "base", "hrm_text")
    adapters = {name: tmp_path / name for name in ("o_proj", "q_proj")}
    for name, place in adapters.items():
        random_adapter(plain(directory, torch.float32), place, target_modules=[name])
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("o_proj", {"base": "quantized"}, r"gqkv_proj\.weight is several layers of the model"),
        ("o_proj", {"base": "original", "dtype": "nf4"}, r"gqkv_proj\.weight is several layers of the model"),
        ("q_proj", {"base": "original"}, r"q_proj\.weight, which .* changes; it is a part of one"),
    ]
    for name, keys, words in refused:
        with pytest.raises(halfbyte.HalfbyteError, match=words):
            halfbyte.merge(str(directory), str(adapters[name]), str(tmp_path / "out"), **keys)
    halfbyte.merge(str(directory), str(adapters["o_proj"]), str(tmp_path / "out"), base="original", dtype="float32")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain(directory, torch.float32), adapters["o_proj"]).eval()(IDS).logits
        found = plain(tmp_path / "out", torch.float32)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_four_bits_are_one_quantization_of_the_sum(base: Path, tmp_path: Path) -> None:
    adapters = [
        random_adapter(plain(base, torch.float32), tmp_path / name, target_modules=["q_proj"], r=rank)
        for name, rank in (("a", 2), ("b", 8))
    ]
    keys: dict[str, Any] = {"dtype": "nf4", "base": "original", "weights": [0.5, 2.0]}
    halfbyte.merge(str(base), [str(adapter) for adapter in adapters], str(tmp_path / "out"), **keys)
    merged, _ = load_model(str(tmp_path / "out"))
    weight = plain(base).model.layers[1].self_attn.q_proj.weight.detach().float()
    for adapter, scale in zip(adapters, (0.5, 2.0), strict=True):
        tensors = load_file(adapter / "adapter_model.safetensors")
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
        rank = len(tensors[key.format("A")])
        weight += scale * 8 / rank * tensors[key.format("B")] @ tensors[key.format("A")]
    layer = merged.model.layers[1].self_attn.q_proj
    assert isinstance(layer, Linear4bit)
    expected = halfbyte.quantize_4bit(weight)
    assert (layer.quantized.packed != expected.packed).float().mean() < 0.01  # a sum in another order, near a midpoint
    assert layer.quantized.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("onto", ["original", "quantized"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_slices_of_rows_make_the_whole(
    base: Path, tmp_path: Path, variant: str, onto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter", **VARIANTS[variant])
    for name, values in (("whole", 1 << 18), ("slices", 160)):
        monkeypatch.setattr(halfbyte.checkpoint.merge, "_SLICE_VALUES", values)
        halfbyte.merge(str(base), str(adapter), str(tmp_path / name), base=onto)
    whole, slices = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "slices"))
    for name, tensor in whole.items():
        torch.testing.assert_close(slices[name], tensor, rtol=2**-7, atol=0)


@pytest.mark.parametrize("shape", [(7, 24), (9, 64), (5, 40), (1, 3), (33, 1)])
@pytest.mark.parametrize("values", [1, 100, 10**6])
def test_slices_of_codes_make_the_whole(shape: tuple[int, int], values: int) -> None:
    quantized = halfbyte.quantize_4bit(torch.randn(shape), block_size=32)
    slices = dict(quantized.row_slices(values))
    if (shape, values) == ((9, 64), 1):
        assert list(slices) == list(range(9))
    assert list(slices) == sorted(slices)
    assert torch.equal(torch.cat(list(slices.values())), quantized.dequantize())


def test_what_is_not_changed_keeps_its_codes(base: Path, tmp_path: Path) -> None:
    loaded, tokenizer = load_model(str(base), block_size=32)
    loaded.save_pretrained(tmp_path / "4bit")
    tokenizer.save_pretrained(tmp_path / "4bit")
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter", target_modules=["q_proj"])
    halfbyte.merge(str(tmp_path / "4bit"), str(adapter), str(tmp_path / "out"), dtype="nf4")
    merged, _ = load_model(str(tmp_path / "out"))
    for name, module in loaded.named_modules():
        if isinstance(module, Linear4bit):
            other = merged.get_submodule(name)
            assert isinstance(other, Linear4bit)
            assert other.block_size == 32
            assert torch.equal(other.quantized.packed, module.quantized.packed) == ("q_proj" not in name)


def test_bitsandbytes_layout_is_what_quantize_writes(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter", target_modules=["q_proj"])
    halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"), dtype="nf4")
    quantize(str(base), str(tmp_path / "quantized"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "quantized"))
    assert {name: (t.dtype, t.shape) for name, t in ours.items() if "quant_state" not in name} == {
        name: (t.dtype, t.shape) for name, t in theirs.items() if "quant_state" not in name
    }
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "quantized")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties"])
def test_sparse_sums_are_pefts(base: Path, tmp_path: Path, combination: str) -> None:
    from peft.utils import merge_utils

    adapters = [
        random_adapter(plain(base, torch.float32), tmp_path / name, target_modules=["up_proj"], r=rank)
        for name, rank in (("a", 2), ("b", 4))
    ]
    keys: dict[str, Any] = {"base": "original", "dtype": "float32", "combination": combination, "density": 0.25}
    halfbyte.merge(str(base), [str(adapter) for adapter in adapters], str(tmp_path / "out"), **keys)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    deltas = []
    for adapter in adapters:
        tensors = load_file(adapter / "adapter_model.safetensors")
        deltas.append(tensors[key.format("B")] @ tensors[key.format("A")])
    torch.manual_seed(42)
    expected = getattr(merge_utils, combination)(deltas, torch.tensor([4.0, 2.0]), 0.25)
    before, after = (plain(d, torch.float32).model.layers[0].mlp.up_proj.weight for d in (base, tmp_path / "out"))
    torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-5)


def test_shards_and_what_lies_beside_them(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter")
    whole = halfbyte.merge(str(base), str(adapter), str(tmp_path / "one"))
    parts = halfbyte.merge(str(base), str(adapter), str(tmp_path / "many"), max_shard_size="20KB")
    assert (whole.files, (tmp_path / "one" / "model.safetensors").is_file()) == (1, True)
    assert parts.files == len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert whole.bytes == parts.bytes
    assert all(file.stat().st_size < 60_000 for file in (tmp_path / "many").glob("*.safetensors"))
    with torch.no_grad():
        assert torch.equal(plain(tmp_path / "one")(IDS).logits, plain(tmp_path / "many")(IDS).logits)
    expected = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "merge.json"}
    assert expected <= {file.name for file in (tmp_path / "one").iterdir()}
    for file in (tmp_path / "many").glob("*.safetensors"):
        tensors = load_file(file)
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


def test_what_is_interrupted_has_no_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter")
    add, calls = ShardWriter.add, []

    def interrupted(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) == 7:
            raise KeyboardInterrupt
        add(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"))
    assert plain(tmp_path / "out").config.model_type == "llama"


def test_what_is_killed_has_no_name(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter")
    code = (
        "import os, signal, sys, halfbyte\n"
        "from halfbyte.checkpoint.shards import ShardWriter\n"
        "add, calls = ShardWriter.add, []\n"
        "def killed(self, name, tensor):\n"
        "    calls.append(name)\n"
        "    if len(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(self, name, tensor)\n"
        "ShardWriter.add = killed\n"
        "halfbyte.merge(*sys.argv[1:])\n"
    )
    arguments = [str(base), str(adapter), str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert ran.returncode == -9, ran.stderr
    assert not (tmp_path / "out").exists()
    halfbyte.merge(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


@pytest.mark.parametrize("more", [[], ["--audit"]])
def test_ctrl_c_leaves_nothing(base: Path, tmp_path: Path, more: list[str]) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter")
    code = (
        "import os, signal, sys\n"
        "from halfbyte.checkpoint.shards import ShardWriter\n"
        "from halfbyte.cli import main\n"
        "add, calls = ShardWriter.add, []\n"
        "def interrupted(self, name, tensor):\n"
        "    calls.append(name)\n"
        "    if len(calls) == 30: os.kill(os.getpid(), signal.SIGINT)\n"  # an audit is at its second model
        "    add(self, name, tensor)\n"
        "ShardWriter.add = interrupted\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    if not more:
        code = code.replace("30", "7")
    command = ["merge", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out"), *more]
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (EXIT_INTERRUPTED, "interrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_full_disk_is_told_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter")
    code = (
        "import resource, sys\n"
        "from halfbyte.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"  # no file grows beyond it
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["merge", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (EXIT_BAD_INPUT, 1), ran.stderr
    assert f"output {tmp_path / 'out'} cannot be written" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_disk_without_room_is_found_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(plain(base, torch.float32), tmp_path / "adapter")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    monkeypatch.setattr(ShardWriter, "add", None)
    with pytest.raises(halfbyte.HalfbyteError, match=r"takes 0\.1 GB while it is made, and its disk has 0\.0 GB left"):
        halfbyte.merge(str(base), str(adapter), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.skipif(not PEER.exists(), reason=f"no environment without halfbyte at {PEER}: make peers")
def test_an_environment_without_halfbyte(base: Path, tmp_path: Path) -> None:
    """Plain transformers opens the merge with the logits of the audit, and plain PEFT the adapter."""
    model, _ = load_model(str(base), "none", compute_dtype=torch.float32, fast=False)
    adapted = halfbyte.add_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    save_adapter(adapted, tmp_path / "adapter", {"any": "record"})
    halfbyte.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), quant_type="none")
    code = (
        "import importlib.util, sys, torch\n"
        "from peft import PeftModel\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "assert importlib.util.find_spec('halfbyte') is None\n"
        "base, adapter, out, file = sys.argv[1:]\n"
        "ids = torch.arange(24).reshape(2, 12)\n"
        "AutoTokenizer.from_pretrained(out)\n"
        "merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()\n"
        "model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)\n"
        "adapted = PeftModel.from_pretrained(model, adapter).eval()\n"
        "with torch.no_grad():\n"
        "    logits = {name: m(ids).logits for name, m in (('merged', merged), ('adapted', adapted))}\n"
        "save_file(logits, file)\n"
    )
    arguments = [str(base), *(str(tmp_path / name) for name in ("adapter", "out", "logits"))]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [PEER, "-c", code, *arguments], capture_output=True, text=True, check=False, env=alone, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    found = load_file(tmp_path / "logits")
    audited, _ = load_model(str(tmp_path / "out"), "none")
    with torch.no_grad():
        torch.testing.assert_close(found["adapted"], adapted.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
        expected = audited(IDS).logits.float()
    assert (found["merged"].float() - expected).norm() < 0.02 * expected.norm()


def test_plain_transformers_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    trained, _ = load_model(str(base), fast=False)
    adapted = load_adapter(trained, random_adapter(plain(base, torch.float32), tmp_path / "adapter"))
    halfbyte.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"))
    code = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False)\n"
        "assert text.startswith('<|im_start|>user'), text\n"
        "with torch.no_grad(): logits = model(torch.arange(24).reshape(2, 12)).logits\n"
        "assert 'halfbyte' not in sys.modules\n"
        "save_file({'logits': logits}, sys.argv[2])\n"
    )
    arguments = [str(tmp_path / "out"), str(tmp_path / "logits.safetensors")]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"].float()
    audited, _ = load_model(str(tmp_path / "out"), "none")  # as an audit loads it
    with torch.no_grad():
        for expected in (adapted(IDS).logits.float(), audited(IDS).logits.float()):
            assert (found - expected).norm() < 0.02 * expected.norm()  # a rounding to bf16 for every layer
