"""Root-mean-square normalization and its gradient to the input.  Zhang and Sennrich (arXiv 1910.07467), equation 4."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "rms_norm"


def rms_norm(
    x: Tensor,  # (..., n), float32, bfloat16 or float16
    weight: Tensor,  # (n,), the dtype of x
    eps: float,
    offset: float = 0.0,  # added to the weight: 1 for the Gemma family, whose weights are stored less one
) -> tuple[Tensor, Tensor]:  # y, as x; rstd, float32, one a row
    """y = x * rstd * (offset + weight), rstd = 1 / sqrt(mean(x²) + eps) over each row.

    Computed in float32 and rounded once. Models that round x * rstd before they multiply differ in the last bit.
    """
    return cast(tuple[Tensor, Tensor], _rms_norm(x, weight, eps, offset))


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0) -> Tensor:
    """The gradient to `x`, from that to `y` and what the forward was given and gave."""
    return cast(Tensor, _rms_norm_backward(grad, x, weight, rstd, offset))


def _run(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    _checks.check_float_dtype(_OP, "x", x.dtype)
    _checks.check_tensor(_OP, "weight", weight, x.dtype, x.shape[-1], x.device)
    return cast(tuple[Tensor, Tensor], _dispatch.call(_OP, x.device.type, x, weight, eps, offset))


def _run_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    _checks.check_float_dtype(_OP, "x", x.dtype)
    _checks.check_tensor(_OP, "grad", grad, x.dtype, x.numel(), x.device)
    _checks.check_tensor(_OP, "weight", weight, x.dtype, x.shape[-1], x.device)
    _checks.check_tensor(_OP, "rstd", rstd, torch.float32, _checks.row_count(x), x.device)
    return cast(Tensor, _dispatch.call("rms_norm_backward", x.device.type, grad, x, weight, rstd, offset))


def _fake(x: Tensor, _weight: Tensor, _eps: float, _offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((_checks.row_count(x),), dtype=torch.float32)


def _fake_backward(_grad: Tensor, x: Tensor, _weight: Tensor, _rstd: Tensor, _offset: float) -> Tensor:
    return x.new_empty(x.shape)


_rms_norm = register("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)", _run, _fake)
_rms_norm_backward = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float offset) -> Tensor",
    _run_backward,
    _fake_backward,
)
