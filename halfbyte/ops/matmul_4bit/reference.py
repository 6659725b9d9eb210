"""The oracle of matmul_4bit: the weight dequantized in the dtype of x, then dense products. On any device."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import NESTED_BLOCK_SIZE
from halfbyte.ops._dropout import STEPS, Dropout
from halfbyte.ops.dequantize_4bit.reference import dequantize_4bit
from halfbyte.ops.dequantize_8bit.reference import dequantize_8bit


def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: list[int],
    transpose: bool,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: float,
    left: Tensor | None,
    right: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    if nested_absmax is not None and nested_codebook is not None:
        absmax = dequantize_8bit(absmax, nested_absmax, nested_codebook, NESTED_BLOCK_SIZE) + nested_offset
    weight = dequantize_4bit(packed, absmax, codebook, block_size, shape, x.dtype)
    y = x @ (weight if transpose else weight.t())
    if left is not None and right is not None:
        low = left @ (right if transpose else right.t())
        if threshold:
            kept = Dropout(seed, threshold / STEPS).kept(low.shape[:-1].numel(), low.shape[-1], low.device)
            low = torch.where(kept.view(low.shape), low, 0.0)
        y = y + low
    return y
