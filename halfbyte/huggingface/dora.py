"""DoRA as a variant of PEFT's, on a base in 4 bits: its parameter and its place on disk; our norms (halfbyte.nn.dora).

PEFT makes B·A, dequantizes the base and takes the norms of their sum in every forward. With dropout it also computes
the base's product twice, once for what is dropped. Here the base sees the whole input, as in the paper's equation, and
only the low-rank term is dropped; without dropout, and in evaluation, the two agree.
"""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from halfbyte.nn import Linear4bit, row_norms, row_squares


class Dora(LoraVariant):  # type: ignore[misc]
    """What PEFT calls for an adapter with `use_dora`."""

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Give the layer its magnitudes: the norms of what it begins with, `(out,)` float32."""
        base, lora_A = module.get_base_layer(), module.lora_A[adapter_name].weight
        if not isinstance(base, Linear4bit):
            return  # a dense one stands in for it while PEFT computes initial values; this is called again after that
        if base.absmax is None or lora_A.is_meta:
            norms = torch.empty(base.out_features, device="meta")
        else:
            norms = norms_of(module, adapter_name)
        magnitude = DoraLinearLayer(fan_in_fan_out=False)
        magnitude.weight = nn.Parameter(norms)
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """On top of `result`, which other adapters may have added to."""
        bias = module.get_base_layer().bias
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        y: Tensor = result if bias is None else result - bias
        y = y + lora_B(lora_A(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
        y = y * row_factors(module, active_adapter)
        if bias is not None:
            y = y + bias
        return y


def row_factors(module: Any, adapter: str) -> Tensor:
    """`(out,)`: m / ‖W + s·B·A‖, with a gradient to m alone."""
    magnitude: Tensor = module.lora_magnitude_vector[adapter].weight
    return magnitude / norms_of(module, adapter)


def norms_of(module: Any, adapter: str) -> Tensor:
    """`(out,)` float32, of the weight that nothing is merged into."""
    quantized = module.unmerged
    known = module.known_squares
    if known is None or known[0] is not quantized.packed:
        known = module.known_squares = quantized.packed, row_squares(quantized)
    factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return row_norms(quantized, known[1], *factors, module.scaling[adapter])
