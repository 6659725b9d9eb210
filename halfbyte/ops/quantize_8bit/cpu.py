"""quantize_8bit on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.formats import block_count
from halfbyte.ops import _checks

_NOT_ASCENDING = -2  # csrc/bindings.cpp


def quantize_8bit(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    values, codebook = values.contiguous(), codebook.contiguous()
    n = values.numel()
    codes = torch.empty(n, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(block_count(n, block_size), dtype=torch.float32, device="cpu")
    bad_block = _C.quantize_8bit(
        values.data_ptr(),
        n,
        block_size,
        codebook.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    if bad_block == _NOT_ASCENDING:
        raise _checks.not_ascending("quantize_8bit")
    if bad_block >= 0:
        raise _checks.not_finite("quantize_8bit", bad_block, block_size, n)
    return codes, absmax
