"""Packed 4-bit codes back to values. The bytes: halfbyte/formats.py."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from halfbyte.formats import block_count, packed_bytes
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "dequantize_4bit"


def dequantize_4bit(
    packed: Tensor,  # ceil(n/2) uint8 in any shape; element 2i in the high nibble
    absmax: Tensor,  # (ceil(n/block_size),) float32
    codebook: Tensor,  # (16,) float32
    block_size: int,  # values that share one absmax; 64 in the paper
    shape: list[int],  # n = prod(shape)
    dtype: torch.dtype,  # float32, bfloat16 or float16
) -> Tensor:  # `shape`, `dtype`
    """w[i] = codebook[code[i]] * absmax[i // block_size], in float32, then rounded to `dtype`, to nearest even.

    Bit-equal in every implementation.  QLoRA (arXiv 2305.14314), section 3, equation 2.
    """
    return cast(Tensor, _dequantize_4bit(packed, absmax, codebook, block_size, shape, dtype))


def _run(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    n = math.prod(shape)
    _checks.check_float_dtype(_OP, "dtype", dtype)
    _checks.check_block_size(_OP, block_size)
    _checks.check_tensor(_OP, "packed", packed, torch.uint8, packed_bytes(n), packed.device)
    _checks.check_tensor(_OP, "absmax", absmax, torch.float32, block_count(n, block_size), packed.device)
    _checks.check_tensor(_OP, "codebook", codebook, torch.float32, 16, packed.device)
    device = "cpu" if packed.is_cpu else packed.device.type
    return cast(Tensor, _dispatch.call(_OP, device, packed, absmax, codebook, block_size, shape, dtype))


def _fake(
    packed: Tensor, _absmax: Tensor, _codebook: Tensor, _block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


_dequantize_4bit = register(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor codebook, int block_size, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
    _run,
    _fake,
)
