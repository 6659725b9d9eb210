"""transformers' own calls on a 4-bit model: load, save, count, generate, classify."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, pipeline

from halfbyte import Linear4bit, QuantizationConfig, load_model, optim
from halfbyte.huggingface import replacements_of
from models import VOCABULARY_SIZE

INPUT_IDS = torch.arange(2 * 9).view(2, 9) * 7 % (VOCABULARY_SIZE - 3)
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture
def source(model_directory: Callable[[str], Path]) -> Path:
    return model_directory("llama")


def in_4_bits(source: Path, quant_type: str = "nf4", double_quant: bool = True) -> PreTrainedModel:
    config = QuantizationConfig(quant_type, double_quant=double_quant)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_a_checkpoint_that_is_loaded_and_saved_again_is_the_same_to_the_byte(
    source: Path, tmp_path: Path, quant_type: str, double_quant: bool
) -> None:
    in_4_bits(source, quant_type, double_quant).save_pretrained(tmp_path / "one")
    # What it is on disk stands above what is asked for, as in transformers.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one", quantization_config=QuantizationConfig("int4", 128))
    again.save_pretrained(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    layer = again.model.layers[0].mlp.up_proj
    assert (layer.quant_type, layer.double_quant, layer.block_size) == (quant_type, double_quant, 64)


def test_the_callers_compute_dtype_is_taken(source: Path, tmp_path: Path) -> None:
    in_4_bits(source).save_pretrained(tmp_path)
    wide = QuantizationConfig(compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=wide)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_operations_are_replaced_unless_it_is_said_otherwise(source: Path) -> None:
    assert {r.status for r in replacements_of(in_4_bits(source))} == {"replaced"}
    plain = QuantizationConfig(fast=False)
    assert not replacements_of(AutoModelForCausalLM.from_pretrained(source, quantization_config=plain))


def test_counts_and_bytes(source: Path) -> None:
    dense, model = AutoModelForCausalLM.from_pretrained(source), in_4_bits(source)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    codes = sum(layer.quantized.nbytes - 4 for layer in layers)  # the offset is a number, and no buffer
    rest = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    rotary = sum(b.nbytes for name, b in model.named_buffers() if "absmax" not in name)
    assert model.get_memory_footprint() == codes + rest + rotary
    assert model.get_memory_footprint() < dense.get_memory_footprint() - 1.4 * weights


def test_generate_and_pipeline_write_what_load_models_model_writes(source: Path) -> None:
    model, (ours, tokenizer) = in_4_bits(source), load_model(str(source))
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = ours.generate(INPUT_IDS, **settings)
    assert torch.equal(model.generate(INPUT_IDS, **settings), expected)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = write("abc", return_full_text=False, **settings)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    written = ours.generate(ids, **settings)[0, ids.shape[1] :]
    assert answer["generated_text"] == tokenizer.decode(written, skip_special_tokens=True)


def test_device_map_auto(source: Path) -> None:
    config = QuantizationConfig()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="auto")
    expected = in_4_bits(source)
    with torch.no_grad():
        assert torch.equal(model(INPUT_IDS).logits, expected(INPUT_IDS).logits)


def test_evaluation_changes_no_weight_and_training_goes_on(source: Path, tmp_path: Path) -> None:
    model = in_4_bits(source)
    model.save_pretrained(tmp_path / "before")
    model.eval()
    with torch.no_grad():
        model(INPUT_IDS)
        model.generate(INPUT_IDS, max_new_tokens=3)
    model.save_pretrained(tmp_path / "after")
    assert load_file(tmp_path / "before" / "model.safetensors").keys()
    assert files_of(tmp_path / "before")["model.safetensors"] == files_of(tmp_path / "after")["model.safetensors"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_classification_head_stays_wide_and_is_trained_and_saved(
    model_type: str, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_directory(model_type), num_labels=3, quantization_config=QuantizationConfig()
    )
    assert type(model.score) is nn.Linear
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == (14 if model_type == "llama" else 8)
    adapted = get_peft_model(
        model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear", init_lora_weights=False)
    )
    labels = torch.tensor([0, 2])
    optimizer = optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=INPUT_IDS, labels=labels).loss
        loss.backward()
        assert adapted.base_model.model.score.modules_to_save["default"].weight.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    assert {name for name in load_file(tmp_path / "adapter_model.safetensors") if "score" in name}


def test_nothing_is_said_while_loading(source: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_4_bits(source)
