"""The oracle of quantize_8bit: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import block_count
from halfbyte.ops import _checks


def quantize_8bit(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = values.numel()
    blocks = block_count(n, block_size)
    if (codebook[:-1] > codebook[1:]).any():
        raise _checks.not_ascending("quantize_8bit")
    x = torch.nn.functional.pad(values.reshape(-1), (0, blocks * block_size - n)).view(blocks, block_size)

    absmax = x.abs().amax(dim=1)  # amax keeps NaN
    finite = absmax.isfinite()
    if not finite.all():
        raise _checks.not_finite("quantize_8bit", int(finite.int().argmin()), block_size, n)

    midpoints = (codebook[:-1] + codebook[1:]) / 2
    scaled = x * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)  # 1/absmax overflows below 2^-128
    codes = torch.bucketize(scaled, midpoints, out_int32=True)  # midpoints below the value; equal is not below
    return codes.to(torch.uint8).view(-1)[:n].clone(), absmax
