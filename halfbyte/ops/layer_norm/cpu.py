"""layer_norm on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = _checks.row_count(x)
    y = empty(x.shape, x.dtype)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device="cpu") for _ in range(2))
    _C.norm_forward(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        _checks.FLOAT_DTYPES.index(x.dtype),
        rows,
        x.shape[-1],
        eps,
        0.0,
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, mean, rstd


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_x = empty(x.shape, x.dtype)
    _C.norm_backward(
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        _checks.FLOAT_DTYPES.index(x.dtype),
        _checks.row_count(x),
        x.shape[-1],
        0.0,
        grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x
