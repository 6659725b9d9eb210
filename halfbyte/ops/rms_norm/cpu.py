"""rms_norm on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    rows, columns = _checks.row_count(x), x.shape[-1]
    y = empty(x.shape, x.dtype)
    rstd = torch.empty(rows, dtype=torch.float32, device="cpu")
    dtype, threads = _checks.FLOAT_DTYPES.index(x.dtype), torch.get_num_threads()
    _C.norm_forward(
        x.data_ptr(), weight.data_ptr(), 0, dtype, rows, columns, eps, offset, y.data_ptr(), 0, rstd.data_ptr(), threads
    )
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    grad, x, weight, rstd = grad.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    grad_x = empty(x.shape, x.dtype)
    _C.norm_backward(
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        0,
        rstd.data_ptr(),
        _checks.FLOAT_DTYPES.index(x.dtype),
        _checks.row_count(x),
        x.shape[-1],
        offset,
        grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x
