"""quantize_4bit on a CUDA device by bitsandbytes' kernels, which write the same format."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from halfbyte.ops import _checks
from halfbyte.ops._bitsandbytes import quant_type_of
from halfbyte.ops.quantize_4bit import reference


def quantize_4bit(values: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    importlib.import_module("bitsandbytes")  # registers torch.ops.bitsandbytes
    quant_type = quant_type_of(codebook)
    n = values.numel()
    if quant_type is None or n == 0:
        return reference.quantize_4bit(values, codebook, block_size)
    bad = ~values.reshape(-1).isfinite()
    if bad.any():
        raise _checks.not_finite("quantize_4bit", int(bad.int().argmax()) // block_size, block_size, n)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(values.contiguous(), block_size, quant_type, torch.uint8)
    return packed.view(-1), absmax
