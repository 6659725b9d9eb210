"""The fingerprint of a base: the same with an adapter and without, another if any weight is."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from halfbyte import add_lora, load_model
from halfbyte.checkpoint.fingerprint import file_sha256, weights_sha256


@pytest.fixture
def model(model_directory: Callable[[str], Path]) -> PreTrainedModel:
    return load_model(str(model_directory("llama")), fast=False)[0]


def test_it_does_not_depend_on_the_adapter_or_the_order_of_loading(
    model: PreTrainedModel, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    alone = weights_sha256(model)
    other, tokenizer = load_model(str(model_directory("llama")), fast=False)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert weights_sha256(load_model(str(tmp_path))[0]) == alone
    adapted = add_lora(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert weights_sha256(adapted) == alone
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    assert weights_sha256(adapted) == alone
    assert weights_sha256(adapted.unload()) == alone


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.absmax",
        "model.layers.1.self_attn.q_proj.nested_absmax",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_it_depends_on_the_last_bit_of_every_weight(model: PreTrainedModel, name: str) -> None:
    before = weights_sha256(model)
    owner, _, leaf = name.rpartition(".")
    with torch.no_grad():
        getattr(model.get_submodule(owner), leaf).view(-1).view(torch.uint8)[-1] ^= 1
    assert weights_sha256(model) != before


def test_it_depends_on_the_offset_and_the_settings(
    model: PreTrainedModel, model_directory: Callable[[str], Path]
) -> None:
    before = weights_sha256(model)
    model.model.layers[0].mlp.up_proj.nested_offsets["weight"] += 1e-7
    assert weights_sha256(model) != before
    others = [("nf4", 128, True), ("nf4", 64, False), ("fp4", 64, True), ("none", 64, True)]
    hashes = {
        weights_sha256(load_model(str(model_directory("llama")), *settings, fast=False)[0]) for settings in others
    }
    assert len(hashes | {before}) == 5


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
