"""What every op asks of its arguments before an address is taken; each failure is one sentence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.formats import BLOCK_SIZES

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_block_size(op: str, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise HalfbyteError(f"{op}: block_size is {block_size}; it must be a power of two from 32 to 4096.")


def check_float_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise HalfbyteError(f"{op}: {name} is {dtype}; it must be float32, bfloat16 or float16.")


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, elements: int, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.numel() != elements or tensor.device != device:
        raise HalfbyteError(
            f"{op}: {name} is {tensor.numel()} elements of {tensor.dtype} on {tensor.device}; "
            f"it must be {elements} of {dtype} on {device}."
        )


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise HalfbyteError(f"{op}: {name} has strides {tensor.stride()}; what is written in place must be contiguous.")


def check_targets(op: str, targets: Tensor, vocabulary: int) -> None:
    if targets.numel():
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= vocabulary:
            raise HalfbyteError(f"{op}: targets go from {lowest} to {highest}; each must be in [0, {vocabulary}).")


def row_count(x: Tensor) -> int:
    """How many rows of its last dimension `x` has."""
    return math.prod(x.shape[:-1])


def not_finite(op: str, block: int, block_size: int, n: int) -> HalfbyteError:
    first, last = block * block_size, min((block + 1) * block_size, n) - 1
    return HalfbyteError(f"{op}: values hold a NaN or an infinity, first among elements {first} to {last}.")


def not_ascending(op: str) -> HalfbyteError:
    return HalfbyteError(f"{op}: codebook must ascend.")
