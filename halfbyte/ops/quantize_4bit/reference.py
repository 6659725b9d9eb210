"""The oracle of quantize_4bit: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import block_count
from halfbyte.ops import _checks


def quantize_4bit(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = values.numel()
    blocks = block_count(n, block_size)
    padding = blocks * block_size - n
    x = torch.nn.functional.pad(values.reshape(-1).to(torch.float32), (0, padding)).view(blocks, block_size)

    absmax = x.abs().amax(dim=1)  # amax keeps NaN
    finite = absmax.isfinite()
    if not finite.all():
        raise _checks.not_finite("quantize_4bit", int(finite.int().argmin()), block_size, n)

    order = torch.argsort(codebook, stable=True)  # equal entries: the lower code first
    ascending = codebook[order]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    scaled = x * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)  # 1/absmax overflows below 2^-128
    ranks = torch.bucketize(scaled, midpoints, out_int32=True)  # midpoints below the value; equal is not below
    # Blocks have an even size, so the padding holds the zero that completes an odd n.
    codes = order[ranks].to(torch.uint8).view(-1)[: n + n % 2]
    return codes[0::2] << 4 | codes[1::2], absmax
