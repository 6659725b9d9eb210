"""Every family of models: loaded in 4 bits, equal to its dense self, trained a step, saved and read again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_models import dense_base
from peft import LoraConfig
from torch import nn

from halfbyte import add_lora, load_model
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.nn import PackedWeights, supervised_loss
from halfbyte.optim import AdamW
from models import ARCHITECTURES, VOCABULARY_SIZE

# How many layers of the two blocks are in 4 bits: all, but the output layer and routers. A block's experts are one.
QUANTIZED_LAYERS = {
    "llama": 14,
    "mistral": 14,
    "qwen2": 14,
    "qwen3": 14,
    "gemma2": 14,
    "gemma3_text": 14,
    "phi3": 8,
    "gpt_neox": 8,
    "gpt2": 8,
    "opt": 12,
    "falcon": 8,
    "granite": 14,
    "mixtral": 10,
    "qwen3_moe": 10,
    "gpt_oss": 10,
}
# Of `all-linear`: the routers of two blocks; PEFT names no experts of gpt-oss.
EXTRA_ADAPTERS = {"mixtral": 2, "qwen3_moe": 2, "gpt_oss": -4}


def layers_of(model: nn.Module) -> dict[str, PackedWeights]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeights)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture(model_type: str, model_directory: Callable[[str], Path], tmp_path: Path) -> None:
    source = model_directory(model_type)
    assert len(list(source.glob("*.safetensors"))) > 1
    model, tokenizer = load_model(str(source), compute_dtype=torch.float32)

    layers = layers_of(model)
    assert len(layers) == QUANTIZED_LAYERS[model_type]
    assert all(parameter.dtype in (torch.uint8, torch.float32) for parameter in model.parameters())
    assert model.get_output_embeddings().weight.is_floating_point()
    assert not model.training

    input_ids = torch.randint(VOCABULARY_SIZE - 3, (2, 11))
    with torch.no_grad():
        logits, expected = model(input_ids).logits, dense_base(model)(input_ids).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    # Byte for byte the same after it is saved and read, constants included.
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path), compute_dtype=torch.float32)
    states = [layer.state_dict() for layer in layers.values()], [x.state_dict() for x in layers_of(again).values()]
    assert layers.keys() == layers_of(again).keys()
    for before, after in zip(*states, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert weights_sha256(again) == weights_sha256(model)

    base = weights_sha256(model)
    adapted = add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    # A and B on every weight in 4 bits and on nothing else, but routers, which PEFT takes as well, and on both weights
    # of experts where PEFT takes `all-linear` to mean them.
    weights = sum(len(layer.shapes) for layer in layers.values())
    assert len(trainable) == 2 * (weights + EXTRA_ADAPTERS.get(model_type, 0))
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    optimizer = AdamW(trainable.values(), lr=1e-2)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(11).expand(2, 11).contiguous(),
        "labels": input_ids,
    }
    losses = []
    for _ in range(3):
        loss = supervised_loss(adapted, batch)
        loss.backward()
        assert all(parameter.grad is not None for parameter in trainable.values())
        assert all(parameter.grad.isfinite().all() for parameter in trainable.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert weights_sha256(adapted) == base


def test_conv1d_weights_are_transposed(model_directory: Callable[[str], Path]) -> None:
    from safetensors.torch import load_file

    source = model_directory("gpt2")
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    model, _ = load_model(str(source), double_quant=False)
    (name,) = [name for name in tensors if name.endswith("h.0.attn.c_attn.weight")]
    stored = tensors[name]
    layer = model.transformer.h[0].attn.c_attn
    assert stored.shape == (32, 96)
    assert (layer.in_features, layer.out_features) == (32, 96)
    difference = (layer.quantized.dequantize(torch.float32) - stored.T.float()).abs()
    assert difference.max() < 0.16 * stored.float().abs().max()
