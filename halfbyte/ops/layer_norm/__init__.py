"""Layer normalization and its gradient to the input.  Ba, Kiros and Hinton (arXiv 1607.06450), equation 3."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "layer_norm"


def layer_norm(
    x: Tensor,  # (..., n), float32, bfloat16 or float16
    weight: Tensor,  # (n,), the dtype of x
    bias: Tensor | None,  # (n,), likewise
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # y, as x; mean and rstd, float32, one a row
    """y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps), in float32, rounded once."""
    return cast(tuple[Tensor, Tensor, Tensor], _layer_norm(x, weight, bias, eps))


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradient to `x`, from that to `y` and what the forward was given and gave."""
    return cast(Tensor, _layer_norm_backward(grad, x, weight, mean, rstd))


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _checks.check_float_dtype(_OP, "x", x.dtype)
    _checks.check_tensor(_OP, "weight", weight, x.dtype, x.shape[-1], x.device)
    if bias is not None:
        _checks.check_tensor(_OP, "bias", bias, x.dtype, x.shape[-1], x.device)
    return cast(tuple[Tensor, Tensor, Tensor], _dispatch.call(_OP, x.device.type, x, weight, bias, eps))


def _run_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    _checks.check_float_dtype(_OP, "x", x.dtype)
    _checks.check_tensor(_OP, "grad", grad, x.dtype, x.numel(), x.device)
    _checks.check_tensor(_OP, "weight", weight, x.dtype, x.shape[-1], x.device)
    _checks.check_tensor(_OP, "mean", mean, torch.float32, _checks.row_count(x), x.device)
    _checks.check_tensor(_OP, "rstd", rstd, torch.float32, _checks.row_count(x), x.device)
    return cast(Tensor, _dispatch.call("layer_norm_backward", x.device.type, grad, x, weight, mean, rstd))


def _fake(x: Tensor, _weight: Tensor, _bias: Tensor | None, _eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((_checks.row_count(x),), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _fake_backward(_grad: Tensor, x: Tensor, _weight: Tensor, _mean: Tensor, _rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_layer_norm = register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", _run, _fake
)
_layer_norm_backward = register(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> Tensor",
    _run_backward,
    _fake_backward,
)
