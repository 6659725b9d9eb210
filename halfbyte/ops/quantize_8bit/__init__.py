"""float32 values to 8-bit codes and one absmax a block: double quantization's constants, 8-bit optimizer states."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.formats import block_count
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "quantize_8bit"


def quantize_8bit(
    values: Tensor,  # any shape, n values of float32
    codebook: Tensor,  # (256,) float32, ascending
    block_size: int,  # values that share one absmax; 256 for double quantization
) -> tuple[Tensor, Tensor]:  # codes (n,) uint8; absmax (ceil(n/block_size),) float32
    """code[i] = the nearest entry to values[i] * (1 / absmax of its block), in float32; a midpoint goes down.

    Exact, and bit-equal in every implementation. HalfbyteError for a NaN or an infinity, naming the elements among
    which the first is.  QLoRA (arXiv 2305.14314), section 3; 8-bit Optimizers (arXiv 2110.02861), section 2.
    """
    return cast(tuple[Tensor, Tensor], _quantize_8bit(values.detach(), codebook, block_size))


def _run(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    _checks.check_block_size(_OP, block_size)
    _checks.check_tensor(_OP, "values", values, torch.float32, values.numel(), values.device)
    _checks.check_tensor(_OP, "codebook", codebook, torch.float32, 256, values.device)
    device = "cpu" if values.is_cpu else values.device.type
    return cast(tuple[Tensor, Tensor], _dispatch.call(_OP, device, values, codebook, block_size))


def _fake(values: Tensor, _codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = values.numel()
    codes = values.new_empty((n,), dtype=torch.uint8)
    return codes, values.new_empty((block_count(n, block_size),), dtype=torch.float32)


_quantize_8bit = register(
    "quantize_8bit(Tensor values, Tensor codebook, int block_size) -> (Tensor, Tensor)", _run, _fake
)
