"""matmul_dense on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty
from halfbyte.ops._rows import rows_of


def matmul_dense(
    x: Tensor, w: Tensor, transpose: bool, scale: float, seed: int, threshold: int, dtype: torch.dtype
) -> Tensor:
    rows, depth = x.shape
    columns = w.shape[1] if transpose else w.shape[0]
    if depth == 0:
        return torch.zeros(rows, columns, dtype=dtype, device="cpu")
    y = empty((rows, columns), dtype)
    if y.numel():
        multiply_into(y, x, w, transpose, scale, seed, threshold)
    return y


def multiply_into(
    y: Tensor,  # (M, N), dense; the dtype of x, or float32
    x: Tensor,
    w: Tensor,
    transpose: bool,
    scale: float = 1.0,
    seed: int = 0,
    threshold: int = 0,
) -> None:
    """As `matmul_dense`, for matrices that are not empty, into memory that is there."""
    rows, depth = x.shape
    x = rows_of(x)
    if w.stride(-1) != 1:
        w = w.contiguous()
    _C.matmul_dense(
        x.data_ptr(),
        x.stride(0),
        w.data_ptr(),
        w.stride(0),
        _checks.FLOAT_DTYPES.index(x.dtype),
        rows,
        depth,
        y.shape[1],
        transpose,
        scale,
        seed,
        threshold,
        y.data_ptr(),
        y.dtype == torch.float32,
        torch.get_num_threads(),
    )
