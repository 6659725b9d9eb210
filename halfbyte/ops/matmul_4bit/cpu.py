"""matmul_4bit on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty
from halfbyte.ops._rows import rows_of
from halfbyte.ops.matmul_4bit import reference


def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: list[int],
    transpose: bool,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    nested_offset: float,
    left: Tensor | None,
    right: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    out_features, in_features = shape
    depth, columns = (out_features, in_features) if transpose else (in_features, out_features)
    y = empty((*x.shape[:-1], columns), x.dtype)
    if y.numel() == 0 or depth == 0:
        constants = nested_absmax, nested_codebook, nested_offset
        return reference.matmul_4bit(
            x, packed, absmax, codebook, block_size, shape, transpose, *constants, left, right, seed, threshold
        )
    x = rows_of(x)
    packed, absmax, codebook = packed.contiguous(), absmax.contiguous(), codebook.contiguous()
    nested = nested_absmax is not None and nested_codebook is not None
    if nested_absmax is not None and nested_codebook is not None:
        nested_absmax, nested_codebook = nested_absmax.contiguous(), nested_codebook.contiguous()
    rank = 0 if left is None else left.shape[-1]
    if left is not None and right is not None and rank > 0:
        left, right = rows_of(left), right.contiguous()
    term = (
        x.data_ptr(),
        x.stride(0),
        packed.data_ptr(),
        0 if nested else absmax.data_ptr(),
        absmax.data_ptr() if nested else 0,
        _address(nested_absmax),
        nested_offset,
        out_features,
    )
    _C.matmul_4bit(
        [term],
        _checks.FLOAT_DTYPES.index(x.dtype),
        len(x),
        _address(nested_codebook),
        codebook.data_ptr(),
        block_size,
        in_features,
        transpose,
        _address(left),
        left.stride(0) if left is not None and rank > 0 else 0,
        _address(right),
        rank,
        seed,
        threshold,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
