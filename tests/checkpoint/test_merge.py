"""Merging: against PEFT's own merge, the adapter on its 4-bit base, and every way in which it must refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
from halfbyte import load_model
from halfbyte.checkpoint.adapter import save_adapter
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.base_weights import open_base
from halfbyte.huggingface.quantizer import QuantizationConfig
from models import ARCHITECTURES, save_model

IDS = torch.arange(24).reshape(2, 12)


def random_adapter(model: PreTrainedModel, directory: Path, **settings: Any) -> Path:
    """An adapter whose every tensor is random, as PEFT saves it."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    adapted = get_peft_model(model, LoraConfig(**values))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                is_whole = "modules_to_save" in name or "magnitude" in name or "trainable_tokens" in name
                parameter.copy_(parameter + noise if is_whole else noise)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return directory


def plain(directory: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(plain(base, torch.float32), adapter).merge_and_unload()
    return dict(model.state_dict())


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
    targets = {"target_modules": "all-linear"}
    if model_type == "mixtral":
        targets = {"target_modules": ["q_proj", "o_proj"]}  # type: ignore[dict-item]
    adapted = halfbyte.add_lora(trained, LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
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
    from halfbyte.checkpoint.merge import Settings, merge_weights

    base = open_base(str(directory), QuantizationConfig())
    written = merge_weights(base, {}, tmp_path, Settings("quantized"))
    if base.unnamed:
        assert written.base_sha256 is None
    else:
        assert written.base_sha256 == weights_sha256(loaded)
