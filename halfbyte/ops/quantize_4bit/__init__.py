"""Values to packed 4-bit codes and one absmax a block. The bytes: halfbyte/formats.py."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.formats import block_count, packed_bytes
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "quantize_4bit"


def quantize_4bit(
    values: Tensor,  # any shape, n values of float32, bfloat16 or float16
    codebook: Tensor,  # (16,) float32, in any order
    block_size: int,  # values that share one absmax; 64 in the paper
) -> tuple[Tensor, Tensor]:  # packed (ceil(n/2),) uint8; absmax (ceil(n/block_size),) float32
    """code[i] = the nearest entry to values[i] * (1 / absmax of its block), in float32.

    Bit-equal in every implementation. HalfbyteError for a NaN or an infinity, found in the same pass, naming the
    elements among which the first is.  QLoRA (arXiv 2305.14314), section 3, equations 1 and 4.
    """
    return cast(tuple[Tensor, Tensor], _quantize_4bit(values.detach(), codebook, block_size))


def _run(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    _checks.check_float_dtype(_OP, "values", values.dtype)
    _checks.check_block_size(_OP, block_size)
    _checks.check_tensor(_OP, "codebook", codebook, torch.float32, 16, values.device)
    device = "cpu" if values.is_cpu else values.device.type
    return cast(tuple[Tensor, Tensor], _dispatch.call(_OP, device, values, codebook, block_size))


def _fake(values: Tensor, _codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = values.numel()
    packed = values.new_empty((packed_bytes(n),), dtype=torch.uint8)
    return packed, values.new_empty((block_count(n, block_size),), dtype=torch.float32)


_quantize_4bit = register(
    "quantize_4bit(Tensor values, Tensor codebook, int block_size) -> (Tensor, Tensor)", _run, _fake
)
