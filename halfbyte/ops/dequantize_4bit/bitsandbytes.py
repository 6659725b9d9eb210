"""dequantize_4bit on a CUDA device by bitsandbytes' kernels, which read the same format."""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor

from halfbyte.ops._bitsandbytes import quant_type_of
from halfbyte.ops.dequantize_4bit import reference


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    importlib.import_module("bitsandbytes")  # registers torch.ops.bitsandbytes
    quant_type = quant_type_of(codebook)
    if quant_type is None or math.prod(shape) == 0:
        return reference.dequantize_4bit(packed, absmax, codebook, block_size, shape, dtype)
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed.contiguous(), absmax.contiguous(), block_size, quant_type, shape, dtype
    )
    return values.view(shape)  # a single dimension comes back as a row
