"""dequantize_8bit on a CUDA device by bitsandbytes' kernels, which read the same format."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    importlib.import_module("bitsandbytes")  # registers torch.ops.bitsandbytes
    values: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        codes.contiguous(), absmax.contiguous(), codebook.contiguous(), block_size, torch.float32
    )
    return values
