"""Embeddings and output layers in 4 bits, where they are asked for: values, adapters, files, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import INPUT_IDS, adapter_of, dense_base, logits, settings
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte import HalfbyteError, Linear4bit, QuantizationConfig, load_model, quantize_4bit
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.outline import outline_model, take_inventory
from halfbyte.nn import Embedding4bit, supervised_loss
from models import build_model, build_tokenizer

# What PEFT says of one tensor in two places.
pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")

BOTH = {"quantize_embeddings": True, "quantize_output_layer": True}
# Of these Qwen 2's two are one tensor, and Gemma 3 scales what it looks up.
MODELS = ["llama", "qwen2", "gemma3_text", "gpt2"]


def in_4_bits(source: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    config = QuantizationConfig(compute_dtype=dtype, **(BOTH | {"block_size": 32} | changes))
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, model_directory: Callable[[str], Path]) -> PreTrainedModel:
    return in_4_bits(model_directory(request.param))


def test_logits_are_those_of_the_dequantized_weights(model: PreTrainedModel) -> None:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, Embedding4bit)
    assert isinstance(head, Linear4bit)
    tied = model.config.tie_word_embeddings
    assert (table.weight is head.weight) == tied
    torch.testing.assert_close(logits(model), logits(dense_base(model)), rtol=1e-4, atol=1e-4)
    assert model.num_parameters() == build_model(model.config.model_type).num_parameters()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64])  # a row is 32 values
def test_rows_are_the_tables(model_directory: Callable[[str], Path], block_size: int, double_quant: bool) -> None:
    model = in_4_bits(model_directory("llama"), block_size=block_size, double_quant=double_quant)
    table = model.get_input_embeddings()
    assert torch.equal(table(INPUT_IDS), table.quantized.dequantize(torch.float32)[INPUT_IDS])


def test_what_is_saved_is_what_is_opened_byte_for_byte(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "once")
    again = in_4_bits(tmp_path / "once", quantize_embeddings=False, quantize_output_layer=False)
    assert weights_sha256(again) == weights_sha256(model)
    mapped, _ = load_model_of(tmp_path / "once", model)
    for other in (again, mapped):
        assert torch.equal(logits(other), logits(model))
    again.save_pretrained(tmp_path / "twice")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.endswith("lm_head.weight.absmax") for name in one) != model.config.tie_word_embeddings


def load_model_of(directory: Path, model: PreTrainedModel) -> Any:
    build_tokenizer().save_pretrained(directory)
    return load_model(str(directory), compute_dtype=model.dtype)


def test_adapters_on_both_are_pefts_on_the_dense_model(model: PreTrainedModel, tmp_path: Path) -> None:
    names = ["wte" if model.config.model_type == "gpt2" else "embed_tokens"]
    names += [] if model.config.tie_word_embeddings else ["lm_head"]
    dense = dense_base(model)
    ours = get_peft_model(model, settings(target_modules=names))
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs = PeftModel.from_pretrained(dense, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    for each in (ours, theirs):
        each(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert len(adapter_of(ours)) == 2 * len(names)
    for (name, mine), other in zip(adapter_of(ours).items(), adapter_of(theirs).values(), strict=True):
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm(), name


def test_merging_and_taking_it_back(model: PreTrainedModel) -> None:
    names = ["wte" if model.config.model_type == "gpt2" else "embed_tokens"]
    before = weights_sha256(model)
    adapted = get_peft_model(model, settings(target_modules=names))
    expected = logits(adapted)
    with adapted.disable_adapter():
        plain = logits(adapted)
    adapted.merge_adapter()
    assert weights_sha256(adapted) != before
    assert (logits(adapted) - expected).norm() < 0.7 * (plain - expected).norm()
    adapted.unmerge_adapter()
    assert weights_sha256(adapted) == before


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("at_once", [True, False])
def test_two_adapters_are_quantized_once(model_directory: Callable[[str], Path], at_once: bool) -> None:
    adapted = get_peft_model(in_4_bits(model_directory("llama")), settings(target_modules=["embed_tokens"]))
    adapted.add_adapter("second", settings(target_modules=["embed_tokens"], r=2))
    layer = adapted.base_model.model.model.embed_tokens
    with torch.no_grad():
        for factors in layer.lora_embedding_B.values():
            factors.normal_(std=0.3)
    before = layer.get_base_layer().quantized
    first, second = (layer.get_delta_weight(name).detach().float() for name in ("default", "second"))
    wanted = quantize_4bit(before.dequantize(torch.float32) + first + second, block_size=32)
    for names in [["default", "second"]] if at_once else [["default"], ["second"]]:
        layer.merge(adapter_names=names)
    assert torch.equal(layer.get_base_layer().quantized.packed, wanted.packed)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().quantized.packed, before.packed)


def test_one_tensor_is_both_or_neither(model_directory: Callable[[str], Path]) -> None:
    for name in BOTH:
        with pytest.raises(HalfbyteError, match="are one tensor; set both"):
            in_4_bits(model_directory("qwen2"), **{name: False})
        assert in_4_bits(model_directory("llama"), **{name: False})


def test_load_model_and_the_outline_agree_to_the_byte(model_directory: Callable[[str], Path]) -> None:
    for model_type in ("llama", "qwen2"):
        source = str(model_directory(model_type))
        model, _ = load_model(source, **BOTH)
        inventory = take_inventory(outline_model(source, settings(), **BOTH))
        found = take_inventory(get_peft_model(model, settings()))
        assert found.quantized_bytes == inventory.quantized_bytes
        assert found.remainder_bytes == inventory.remainder_bytes
        assert found.parameters == inventory.parameters == build_model(model_type).num_parameters()


def test_the_loss_of_a_run_is_the_models_own(model: PreTrainedModel) -> None:
    batch = {
        "input_ids": INPUT_IDS,
        "attention_mask": torch.ones_like(INPUT_IDS),
        "position_ids": torch.arange(9).expand(2, 9),
        "labels": INPUT_IDS,
    }
    mean = model(INPUT_IDS, labels=INPUT_IDS).loss
    torch.testing.assert_close(supervised_loss(model, batch) / 16, mean, rtol=1e-4, atol=1e-4)


def test_bitsandbytes_keys_say_what_is_skipped(model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    in_4_bits(model_directory("llama"), quantize_embeddings=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "lm_head" not in saved["llm_int8_skip_modules"]
    assert "halfbyte_embeddings_4bit" not in saved


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [7]},
        {"trainable_token_indices": {"embed_tokens": [7]}},
    ],
    ids=str,
)
def test_codes_are_not_trained(model_directory: Callable[[str], Path], changes: dict[str, Any]) -> None:
    with pytest.raises(HalfbyteError, match="is in 4 bits, so that it can have an adapter"):
        get_peft_model(in_4_bits(model_directory("llama")), settings(target_modules=["q_proj"], **changes))


def test_no_tokens_are_added_to_codes(model: PreTrainedModel) -> None:
    before = weights_sha256(model)
    with pytest.raises(HalfbyteError, match="Tokens cannot be added where the embedding"):
        model.resize_token_embeddings(300)
    model.resize_token_embeddings()
    assert weights_sha256(model) == before


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "olora"}], ids=str)
def test_what_an_embedding_in_4_bits_does_not_take(
    model_directory: Callable[[str], Path], changes: dict[str, Any]
) -> None:
    with pytest.raises(HalfbyteError, match="plain LoRA alone"):
        get_peft_model(in_4_bits(model_directory("llama")), settings(target_modules=["embed_tokens"], **changes))
