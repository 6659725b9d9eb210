"""The oracle of dequantize_4bit: plain torch, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    n = math.prod(shape)
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).view(-1)[:n]
    values = codebook[codes.int()] * absmax.repeat_interleave(block_size)[:n]
    return values.to(dtype).view(shape)
