"""dequantize_4bit on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    packed, absmax, codebook = packed.contiguous(), absmax.contiguous(), codebook.contiguous()
    values = torch.empty(shape, dtype=dtype, device="cpu")
    _C.dequantize_4bit(
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        values.numel(),
        block_size,
        values.data_ptr(),
        _checks.FLOAT_DTYPES.index(dtype),
        torch.get_num_threads(),
    )
    return values
