"""A real model: SmolLM2-135M-Instruct speaks sense in 4 bits, and learns."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte import Linear4bit, add_lora, load_model
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.huggingface.generate import generate_texts
from halfbyte.nn import count_supervised, supervised_loss
from halfbyte.optim import AdamW

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
PARAGRAPH = (
    "The lighthouse stands at the end of a long stone pier, where the river meets the sea. It was built more than two "
    "hundred years ago, after a winter in which eleven ships were lost on the rocks in a single night. For most of its "
    "life a keeper and his family lived in the small house beside it, and every evening one of them climbed the stairs "
    "to light the lamp. Today the lamp is electric and nobody lives there, but in the summer visitors can climb to the "
    "top and look out over the harbour, the town and the hills behind it."
)


@pytest.fixture(scope="module")
def loaded(smollm2_directory: Path) -> Loaded:
    return load_model(str(smollm2_directory))


def batch_of(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, torch.Tensor]:
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(input_ids.shape[1])[None],
        "labels": input_ids,
    }


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    batch = batch_of(tokenizer, PARAGRAPH)
    with torch.no_grad():
        return math.exp(supervised_loss(model, batch).item() / count_supervised(batch))


def test_every_linear_layer_is_in_4_bits(loaded: Loaded) -> None:
    model, _ = loaded
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 30 * 7
    held = sum(layer.quantized.nbytes for layer in layers)
    weights = sum(layer.quantized.shape.numel() for layer in layers)
    assert weights == 106_168_320
    assert 8 * held / weights <= 4.128


def test_perplexity_is_a_little_worse_than_in_16_bits(loaded: Loaded, smollm2_directory: Path) -> None:
    exact = perplexity(*load_model(str(smollm2_directory), "none"))
    quantized = perplexity(*loaded)
    assert 5 < exact < 60
    assert exact < quantized < 2 * exact


def test_it_knows_a_capital(loaded: Loaded) -> None:
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    (answer,) = generate_texts(model, tokenizer, [prompt], 24)
    assert "Paris" in answer


def test_the_gguf_file_is_the_same_model(loaded: Loaded, smollm2_gguf: Path) -> None:
    model, tokenizer = load_model(str(smollm2_gguf))
    assert weights_sha256(model) == weights_sha256(loaded[0])
    assert tokenizer.chat_template == loaded[1].chat_template
    assert tokenizer(PARAGRAPH)["input_ids"] == loaded[1](PARAGRAPH)["input_ids"]


def test_it_learns_and_the_base_stays(smollm2_directory: Path) -> None:
    model, tokenizer = load_model(str(smollm2_directory))
    base = weights_sha256(model)
    adapted = add_lora(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = AdamW(trainable, lr=1e-3)
    batch = batch_of(tokenizer, PARAGRAPH)
    losses = []
    for _ in range(3):
        loss = supervised_loss(adapted, batch) / count_supervised(batch)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert weights_sha256(adapted) == base
