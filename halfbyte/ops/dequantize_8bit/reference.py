"""The oracle of dequantize_8bit: plain torch, on any device."""

from __future__ import annotations

from torch import Tensor


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    values = codebook[codes.reshape(-1).int()] * absmax.repeat_interleave(block_size)[: codes.numel()]
    return values.view(codes.shape)
