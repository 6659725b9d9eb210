"""load_model: what can be wrong with a model's files, each told in one sentence that names the file or the tensor."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import halfbyte
from halfbyte import HalfbyteError, Linear4bit
from halfbyte.huggingface import load_tokenizer
from models import CHATML, build_model

# What it puts in the place of a model's own operations is test_patch.py's matter.
load_model = partial(halfbyte.load_model, fast=False)

Tensors = dict[str, Tensor]
WEIGHT = "model.layers.1.self_attn.k_proj.weight"  # (16, 32), to be quantized
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def source(model_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to break: a model in several shards."""
    shutil.copytree(model_directory("llama"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def quantized(model_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to break: the same model in 4 bits, in one file."""
    directory = tmp_path / "quantized"
    model, tokenizer = load_model(str(model_directory("llama")))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def shard_of(directory: Path, tensor: str) -> Path:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return directory / "model.safetensors"
    return directory / json.loads(index.read_text())["weight_map"][tensor]


def edit(file: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(directory: Path | str, quant_type: str = "nf4") -> str:
    with pytest.raises(HalfbyteError) as caught:
        load_model(str(directory), quant_type)
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 500
    return told


# ── What is loaded ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_model_is_of_its_class_with_tokenizer_and_generation_config(source: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({"max_length": 77, "eos_token_id": [3, 5]}))
    model, tokenizer = load_model(str(source))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    assert (model.generation_config.max_length, model.generation_config.eos_token_id) == (77, [3, 5])
    assert model.config.name_or_path == str(source)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_in_4_bits_has_compute_dtype(source: Path, dtype: torch.dtype) -> None:
    model, _ = load_model(str(source), compute_dtype=dtype)
    others = {p.dtype for module in model.modules() for p in module.parameters(False) if p.dtype != torch.uint8}
    assert others == {dtype}
    assert all(layer.compute_dtype == dtype for layer in model.modules() if isinstance(layer, Linear4bit))


def test_settings_reach_every_layer(source: Path) -> None:
    model, _ = load_model(str(source), "fp4", 128, double_quant=False)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 14
    assert {(layer.quant_type, layer.block_size, layer.double_quant) for layer in layers} == {("fp4", 128, False)}


def test_none_leaves_every_weight_as_it_is_on_disk(source: Path) -> None:
    model, _ = load_model(str(source), "none")
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    on_disk = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    assert all(torch.equal(tensor, on_disk[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


def test_a_4_bit_checkpoint_is_taken_as_it_is_whatever_is_asked_for(quantized: Path) -> None:
    as_asked, _ = load_model(str(quantized), "fp4", 32, double_quant=False)
    layer = as_asked.model.layers[0].mlp.up_proj
    assert (layer.quant_type, layer.block_size, layer.double_quant) == ("nf4", 64, True)
    saved = load_file(quantized / "model.safetensors")
    assert torch.equal(layer.weight, saved["model.layers.0.mlp.up_proj.weight"])


def test_weights_of_another_dtype_are_read(source: Path) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        edit(shard_of(source, WEIGHT), lambda t, dtype=dtype: t.update({WEIGHT: t[WEIGHT].to(dtype)}))
        model, _ = load_model(str(source))
        assert model.model.layers[1].self_attn.k_proj.quantized.dtype == torch.bfloat16


def test_a_tensor_that_the_model_does_not_have_is_passed_over(source: Path) -> None:
    edit(shard_of(source, WEIGHT), lambda t: t.update({"model.layers.0.rotary.inv_freq": torch.ones(3)}))
    load_model(str(source))


# ── What is wrong with the files ────────────────────────────────────────────────────────────────────────────


def test_a_path_that_is_not_there() -> None:
    assert "/no/such/model" in refusal("/no/such/model")
    assert "no-such.gguf" in refusal("no-such.gguf")
    assert "nothing-here" in refusal("nothing-here")


def test_a_hub_id_that_cannot_be_had_offline() -> None:
    told = refusal("nobody/no-such-model-of-halfbyte")
    assert "nobody/no-such-model-of-halfbyte" in told
    assert "hub" in told


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "weights.bin" in refusal(tmp_path / "weights.bin")


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "frobnicate"}, "frobnicate"),
    ({"model_type": None}, "config.json"),
    ({"model_type": "clip"}, "'clip' is not a causal language model"),
    ({"model_type": "t5"}, "'t5' is not a causal language model"),
    ({"hidden_size": "a"}, "hidden_size"),
    ({"num_attention_heads": 3}, "attention heads"),
    ({"hidden_size": 64}, r"model\.\S+ ?(: the weight)? is \(\d+, \d+\) where"),
    ({"num_hidden_layers": 3}, r"lacks 9 .* model\.layers\.2\.input_layernorm\.weight"),
    ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "nope"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": "4 bits"}, "config.json"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        r"model\.layers\.0\.mlp\.down_proj\.weight: the weight has no constants",
    ),
    ({"model_type": "own", "auto_map": {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}}, "custom code"),
]


@pytest.mark.parametrize(("change", "told"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_that_does_not_fit(
    source: Path, change: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with caplog.at_level(logging.WARNING):
        sentence = refusal(source)
    assert pytest.RaisesExc(HalfbyteError, match=told).matches(HalfbyteError(sentence)), sentence
    assert str(source) in sentence
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', '{"a": 1}'])
def test_json_that_is_not_what_it_should_be(source: Path, name: str, content: str) -> None:
    (source / name).write_text(content)
    if name == "generation_config.json" and content == '{"a": 1}':
        load_model(str(source))  # a key that means nothing to generation
    else:
        assert str(source) in refusal(source)


def test_a_tokenizer_that_is_missing(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(HalfbyteError, match="holds no tokenizer"):
        load_tokenizer(str(source))


def test_weights_only_as_pickle(source: Path) -> None:
    for file in source.glob("*.safetensors*"):
        file.unlink()
    assert "safetensors" in refusal(source)
    torch.save(build_model().state_dict(), source / "pytorch_model.bin")
    assert "pickle" in refusal(source)


def test_a_shard_that_is_missing(source: Path) -> None:
    shard = shard_of(source, WEIGHT)
    shard.unlink()
    assert shard.name in refusal(source)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}', '{"metadata": {}}'],
)
def test_an_index_that_is_no_index(source: Path, content: str) -> None:
    (source / "model.safetensors.index.json").write_text(content)
    told = refusal(source)
    assert "model.safetensors.index.json" in told


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_shard_is_named(source: Path, kept: float) -> None:
    shard = shard_of(source, WEIGHT)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    assert shard.name in refusal(source)


@pytest.mark.parametrize("header", [b"\xff" * 8, (10**9).to_bytes(8, "little"), (20).to_bytes(8, "little")])
def test_a_shard_with_a_hostile_header_is_named(source: Path, header: bytes) -> None:
    shard = shard_of(source, WEIGHT)
    shard.write_bytes(header + shard.read_bytes()[8:])
    assert shard.name in refusal(source)


@pytest.mark.parametrize("name", [WEIGHT, NORM, EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_a_missing_tensor_is_named(source: Path, name: str, quant_type: str) -> None:
    edit(shard_of(source, name), lambda tensors: tensors.pop(name))
    assert name in refusal(source, quant_type)


@pytest.mark.parametrize("name", [WEIGHT, NORM, EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(source: Path, name: str, quant_type: str, value: float) -> None:
    edit(shard_of(source, name), lambda tensors: tensors[name].view(-1).__setitem__(-1, value))
    told = refusal(source, quant_type)
    assert name in told
    assert "NaN" in told


@pytest.mark.parametrize("name", [WEIGHT, NORM, EMBEDDING])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize("change", ["cut", "transposed"])
def test_a_tensor_of_another_shape_is_named(source: Path, name: str, quant_type: str, change: str) -> None:
    if change == "transposed" and name == NORM:
        change = "cut"
    changed = {"cut": lambda t: t[:-1].clone(), "transposed": lambda t: t.T.contiguous()}[change]
    edit(shard_of(source, name), lambda tensors: tensors.update({name: changed(tensors[name])}))
    told = refusal(source, quant_type)
    assert name in told
    assert "where" in told


@pytest.mark.parametrize("suffix", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", ""])
def test_a_missing_key_of_a_4_bit_weight_is_named(
    quantized: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"{WEIGHT}.{suffix}".rstrip(".")

    def remove(tensors: Tensors) -> None:
        del tensors[min(name for name in tensors if name.startswith(key))]

    edit(quantized / "model.safetensors", remove)
    told = refusal(quantized)
    assert WEIGHT in told
    assert suffix in told
    assert "Traceback" not in caplog.text


def test_a_4_bit_weight_without_any_constants_is_named(quantized: Path) -> None:
    def strip(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{WEIGHT}.")]:
            del tensors[name]

    edit(quantized / "model.safetensors", strip)
    assert WEIGHT in refusal(quantized)


def test_a_4_bit_weight_where_the_config_says_16_bits_is_named(quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["k_proj", "lm_head"]
    (quantized / "config.json").write_text(json.dumps(config))
    assert "k_proj.weight" in refusal(quantized)


@pytest.mark.parametrize(("arguments", "word"), [({"quant_type": "nf5"}, "nf5"), ({"block_size": 48}, "block_size")])
def test_settings_that_are_not_known(source: Path, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(HalfbyteError, match=word):
        load_model(str(source), **arguments)


def test_a_model_without_linear_layers_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.huggingface.quantizer._LINEAR", ())
    assert "quant_type none" in refusal(source)
