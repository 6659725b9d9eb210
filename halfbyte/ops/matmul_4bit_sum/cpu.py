"""matmul_4bit_sum on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty
from halfbyte.ops._rows import rows_of
from halfbyte.ops.matmul_4bit_sum import reference


def matmul_4bit_sum(
    x: list[Tensor],
    packed: list[Tensor],
    absmax: list[Tensor],
    out_features: list[int],
    codebook: Tensor,
    block_size: int,
    in_features: int,
    nested_absmax: list[Tensor],
    nested_codebook: Tensor | None,
    nested_offset: list[float],
    left: Tensor | None,
    right: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    y = empty((*x[0].shape[:-1], in_features), x[0].dtype)
    if y.numel() == 0 or 0 in out_features:
        constants = codebook, block_size, in_features, nested_absmax, nested_codebook, nested_offset
        return reference.matmul_4bit_sum(x, packed, absmax, out_features, *constants, left, right, seed, threshold)
    x, packed, absmax = (
        [rows_of(each) for each in x],
        [c.contiguous() for c in packed],
        [a.contiguous() for a in absmax],
    )
    codebook, nested_absmax = codebook.contiguous(), [a.contiguous() for a in nested_absmax]
    nested_codebook = nested_codebook.contiguous() if nested_codebook is not None else None
    rank = 0 if left is None else left.shape[-1]
    if left is not None and right is not None and rank > 0:
        left, right = rows_of(left), right.contiguous()
    _C.matmul_4bit(
        [
            (
                x[i].data_ptr(),
                x[i].stride(0),
                packed[i].data_ptr(),
                0 if nested_absmax else absmax[i].data_ptr(),
                absmax[i].data_ptr() if nested_absmax else 0,
                nested_absmax[i].data_ptr() if nested_absmax else 0,
                nested_offset[i] if nested_absmax else 0.0,
                out,
            )
            for i, out in enumerate(out_features)
        ],
        _checks.FLOAT_DTYPES.index(y.dtype),
        len(x[0]),
        0 if nested_codebook is None else nested_codebook.data_ptr(),
        codebook.data_ptr(),
        block_size,
        in_features,
        True,
        0 if left is None else left.data_ptr(),
        left.stride(0) if left is not None and rank > 0 else 0,
        0 if right is None else right.data_ptr(),
        rank,
        seed,
        threshold,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
