"""A .gguf file is the model that it was made from, and a broken one is a sentence."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

import halfbyte
from halfbyte import HalfbyteError, Linear4bit
from halfbyte.checkpoint.fingerprint import weights_sha256
from models import CHATML, save_gguf

load_model = partial(halfbyte.load_model, fast=False)
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F16.gguf"
    save_gguf(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_the_file_holds(kind: str, tmp_path: Path) -> None:
    original = save_gguf(tmp_path / "tiny.gguf", kind).state_dict()
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), "none", compute_dtype=torch.float32)
    state = model.state_dict()
    assert state.keys() == original.keys()
    if kind == "F32":
        assert all(torch.equal(state[name], original[name]) for name in state)
    # Not reordered by llama.cpp, so to be compared with the file to the last bit.
    held = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    for theirs, ours in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        tensor = held[theirs]
        assert tensor.tensor_type == GGMLQuantizationType["F32" if "norm" in theirs else kind]
        assert np.array_equal(state[ours].numpy(), dequantize(tensor.data, tensor.tensor_type))
    # And those that are: near the original, by what the kind keeps.
    error = max((state[name] - original[name]).abs().max().item() for name in state)
    assert error < {"F32": 1e-9, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01}.get(kind, 0.2)
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.eos_token, tokenizer("hi<|im_end|>")["input_ids"][-1]) == ("<|im_end|>", 257)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (256, 257)


@pytest.mark.parametrize("quant_type", ["none", "nf4"])
def test_it_is_the_same_model_as_the_directory_that_is_saved_from_it(
    file: Path, tmp_path: Path, quant_type: str
) -> None:
    model, tokenizer = load_model(str(file), "none")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    from_file, _ = load_model(str(file), quant_type)
    from_directory, _ = load_model(str(tmp_path), quant_type)
    assert weights_sha256(from_file) == weights_sha256(from_directory)
    assert any(isinstance(module, Linear4bit) for module in from_file.modules()) == (quant_type == "nf4")


def test_a_4_bit_model_from_gguf_is_saved_as_a_4_bit_checkpoint(file: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(file))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert weights_sha256(load_model(str(tmp_path))[0]) == weights_sha256(model)


@pytest.mark.parametrize("kept", [0, 3, 4, 8, 24, 1000, 0.3, 0.9, -1])
def test_a_truncated_file_is_named(file: Path, tmp_path: Path, kept: float) -> None:
    content = file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(HalfbyteError, match=r"cut\.gguf"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (b"GGUF", b"GGML", "not a GGUF file"),
        (b"GGUF\x03\x00", b"GGUF\x63\x00", "changed"),
        (b"general.architecture", b"general.architecturf", "changed"),
        (b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00xlama", "xlama"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_ux.weight", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        (b"llama.block_count", b"llama.block_counx", "changed"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.modex", "changed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_was_changed_is_refused(file: Path, tmp_path: Path, before: bytes, after: bytes, told: str) -> None:
    path = tmp_path / "changed.gguf"
    assert file.read_bytes().count(before) >= 1
    path.write_bytes(file.read_bytes().replace(before, after, 1))
    with pytest.raises(HalfbyteError, match=told) as caught:
        load_model(str(path))
    assert "changed.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_type_of_block_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "Q5_1")
    with pytest.raises(HalfbyteError, match="ggml type 7"):
        load_model(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("ggml_type", [99, 5, 2**31])
def test_a_type_of_block_that_is_not_known_is_refused(file: Path, tmp_path: Path, ggml_type: int) -> None:
    content = bytearray(file.read_bytes())
    name = b"blk.1.ffn_up.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # after the name: dimensions, their number of sizes, the type
    assert int.from_bytes(content[place : place + 4], "little") == GGMLQuantizationType.F16
    content[place : place + 4] = ggml_type.to_bytes(4, "little")
    (tmp_path / "changed.gguf").write_bytes(content)
    with pytest.raises(HalfbyteError, match=r"changed\.gguf"):
        load_model(str(tmp_path / "changed.gguf"))


@pytest.mark.parametrize("quant_type", ["none", "nf4"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    file: Path, tmp_path: Path, quant_type: str, theirs: str, ours: str
) -> None:
    (tensor,) = [tensor for tensor in GGUFReader(file).tensors if tensor.name == theirs]
    content = bytearray(file.read_bytes())
    dtype = np.float32 if "norm" in theirs else np.float16
    value = np.array([math.nan], dtype=dtype).tobytes()
    content[tensor.data_offset : tensor.data_offset + len(value)] = value
    (tmp_path / "changed.gguf").write_bytes(content)
    with pytest.raises(HalfbyteError, match=ours):
        load_model(str(tmp_path / "changed.gguf"), quant_type)
