"""Initial values of an adapter that are made from the base weight: PiSSA, OLoRA, LoftQ.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) take the adapter out of the weight, and what is left is the base.
PEFT computes that, on a dense layer that stands in for the one in 4 bits; what is left is then quantized again, as in
QPiSSA. LoftQ (arXiv 2310.08659) makes the adapter from what quantization loses, so it needs the weight from before:
it is read from where the model was loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.safetensors_files import read_safetensors
from halfbyte.huggingface.source import locate
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantizedTensor, quantize_like

# PEFT's initial values that do not look at the base weight.
INDEPENDENT = (True, False, "gaussian", "eva")


def check_initializer(name: Any) -> None:
    """Raises HalfbyteError for initial values that a base in 4 bits cannot have."""
    if name not in (*INDEPENDENT, "loftq") and not reads_base(name):
        raise HalfbyteError(
            f"init_lora_weights {name!r} is not there for a base in 4 bits; use True, gaussian, pissa, olora or loftq."
        )


def reads_base(name: Any) -> bool:
    """Whether PEFT makes these initial values from the base weight, or in its dtype."""
    return isinstance(name, str) and (name.startswith("pissa") or name in ("olora", "orthogonal"))


@contextmanager
def dense_stand_in(layer: Any) -> Iterator[None]:
    """Within, the base of a LoRA layer is dense and float32; afterwards it is what became of that, in 4 bits."""
    base: Linear4bit = layer.base_layer
    before = base.quantized
    weight = before.dequantize(torch.float32)
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.base_layer = dense
    try:
        yield
    finally:
        layer.base_layer = base
    if not torch.equal(dense.weight, weight):
        base.quantized = quantize_like(dense.weight, before)


def loftq(
    weight: Tensor,  # (out, in)
    like: QuantizedTensor,  # of what type, block size and storage
    rank: int,
    scaling: float,  # s
    iterations: int,
) -> tuple[QuantizedTensor, Tensor, Tensor]:  # Q (out, in), A (r, in) and B (out, r) float32
    """Q + s·B·A near W: each in turn the best for the other.  LoftQ (arXiv 2310.08659), algorithm 1."""
    wide = weight.float()
    low_rank = torch.zeros_like(wide)
    for _ in range(iterations):
        quantized = quantize_like(wide - low_rank, like)
        left, values, right = torch.linalg.svd(wide - quantized.dequantize(torch.float32), full_matrices=False)
        roots = (values[:rank] / scaling).sqrt()
        lora_A, lora_B = roots[:, None] * right[:rank], left[:, :rank] * roots
        low_rank = scaling * lora_B @ lora_A
    return quantized, lora_A.contiguous(), lora_B.contiguous()


@torch.no_grad()
def initialize_loftq(model: Any, layers: dict[str, Any], adapter: str, config: LoraConfig) -> None:
    """Begin every layer's adapter, and its base, with LoftQ.

    Args:
        model: transformers', loaded from a directory, or hub id, that holds its weights in 16 bits.
        layers: LoRA layers by their names in the model.

    Raises:
        HalfbyteError: the weights are not there in 16 bits, or `loftq_config` asks for other than 4.
    """
    bits, iterations = config.loftq_config.get("loftq_bits", 4), config.loftq_config.get("loftq_iter", 1)
    if bits != 4 or iterations < 1:
        raise HalfbyteError(
            f"loftq_config asks for {bits} bits and {iterations} iterations; use 4 bits, and 1 or more."
        )
    tensors = read_safetensors(locate(model.name_or_path).directory)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        weight = _original_weight(model, tensors, name, base)
        if layer.r[adapter] > min(weight.shape):
            raise HalfbyteError(f"{name}: LoftQ has no more than {min(weight.shape)} ranks there; lower r.")
        base.quantized, lora_A, lora_B = loftq(
            weight, base.quantized, layer.r[adapter], layer.scaling[adapter], iterations
        )
        layer.lora_A[adapter].weight.copy_(lora_A)
        layer.lora_B[adapter].weight.copy_(lora_B)
        if adapter in layer.lora_variant:
            layer.lora_variant[adapter].init(layer, adapter)


def _original_weight(model: Any, tensors: dict[str, Any], name: str, base: Linear4bit) -> Tensor:
    key = f"{name}.weight"
    # A checkpoint of the model without its head has names without this prefix.
    found = next((k for k in (key, key.removeprefix(f"{model.base_model_prefix}.")) if k in tensors), None)
    weight: Tensor | None = tensors[found][...] if found is not None else None
    if weight is not None and key in getattr(getattr(model, "hf_quantizer", None), "transposed", ()):
        weight = weight.T
    if weight is None or not weight.is_floating_point() or weight.shape != (base.out_features, base.in_features):
        raise HalfbyteError(
            f"{model.name_or_path} does not hold {key} in 16 bits, of which LoftQ is made;"
            " load the model from its 16-bit checkpoint."
        )
    return weight
