"""8-bit codes back to float32 values."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.formats import block_count
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "dequantize_8bit"


def dequantize_8bit(
    codes: Tensor,  # any shape, n values of uint8
    absmax: Tensor,  # (ceil(n/block_size),) float32
    codebook: Tensor,  # (256,) float32
    block_size: int,  # values that share one absmax; 256 for double quantization
) -> Tensor:  # the shape of codes, float32
    """x[i] = codebook[codes[i]] * absmax[i // block_size], in float32. Bit-equal in every implementation."""
    return cast(Tensor, _dequantize_8bit(codes, absmax, codebook, block_size))


def _run(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    n = codes.numel()
    _checks.check_block_size(_OP, block_size)
    _checks.check_tensor(_OP, "codes", codes, torch.uint8, n, codes.device)
    _checks.check_tensor(_OP, "absmax", absmax, torch.float32, block_count(n, block_size), codes.device)
    _checks.check_tensor(_OP, "codebook", codebook, torch.float32, 256, codes.device)
    device = "cpu" if codes.is_cpu else codes.device.type
    return cast(Tensor, _dispatch.call(_OP, device, codes, absmax, codebook, block_size))


def _fake(codes: Tensor, _absmax: Tensor, _codebook: Tensor, _block_size: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


_dequantize_8bit = register(
    "dequantize_8bit(Tensor codes, Tensor absmax, Tensor codebook, int block_size) -> Tensor", _run, _fake
)
