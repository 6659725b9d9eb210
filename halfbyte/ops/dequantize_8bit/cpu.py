"""dequantize_8bit on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    codes, absmax, codebook = codes.contiguous(), absmax.contiguous(), codebook.contiguous()
    values = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    _C.dequantize_8bit(
        codes.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        codes.numel(),
        block_size,
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return values
