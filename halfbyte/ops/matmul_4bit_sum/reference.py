"""The oracle of matmul_4bit_sum: dense products of the dequantized weights, one after the other. On any device."""

from __future__ import annotations

from torch import Tensor

from halfbyte.ops.matmul_4bit import reference


def matmul_4bit_sum(
    x: list[Tensor],
    packed: list[Tensor],
    absmax: list[Tensor],
    out_features: list[int],
    codebook: Tensor,
    block_size: int,
    in_features: int,
    nested_absmax: list[Tensor],
    nested_codebook: Tensor | None,
    nested_offset: list[float],
    left: Tensor | None,
    right: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    products = []
    for i, out in enumerate(out_features):
        shape = [out, in_features]
        nested = (nested_absmax[i], nested_offset[i]) if nested_absmax else (None, 0.0)
        t, A = (left, right) if i == 0 else (None, None)
        products.append(
            reference.matmul_4bit(
                *(x[i], packed[i], absmax[i], codebook, block_size, shape, True),
                *(nested[0], nested_codebook, nested[1], t, A, seed, threshold),
            )
        )
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total
