"""quantize_4bit on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.formats import block_count, packed_bytes
from halfbyte.ops import _checks


def quantize_4bit(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    values, codebook = values.contiguous(), codebook.contiguous()
    n = values.numel()
    packed = torch.empty(packed_bytes(n), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(block_count(n, block_size), dtype=torch.float32, device="cpu")
    bad_block = _C.quantize_4bit(
        values.data_ptr(),
        _checks.FLOAT_DTYPES.index(values.dtype),
        n,
        block_size,
        codebook.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    if bad_block >= 0:
        raise _checks.not_finite("quantize_4bit", bad_block, block_size, n)
    return packed, absmax
