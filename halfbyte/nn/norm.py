"""Normalization whose backward keeps the input and a number or two a row: everything else is computed again."""

from typing import Any

import torch
from torch import Tensor

from halfbyte import ops


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, rstd = ops.rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight, rstd) = grads, ctx.saved_tensors
        grad_x = ops.rms_norm_backward(grad, x, weight, rstd, ctx.offset) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:  # seldom: the base model is frozen
            z = x.float() * rstd.view(*x.shape[:-1], 1)
            grad_weight = (grad.float() * z).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = ops.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,), (x, weight, mean, rstd) = grads, ctx.saved_tensors
        grad_x = ops.layer_norm_backward(grad, x, weight, mean, rstd) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            z = (x.float() - mean.view(*x.shape[:-1], 1)) * rstd.view(*x.shape[:-1], 1)
            grad_weight = (grad.float() * z).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.float().flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def rms_norm(
    x: Tensor,  # (..., n)
    weight: Tensor,  # (n,), the dtype of x
    eps: float,
    offset: float = 0.0,  # added to the weight; 1 for the Gemma family
) -> Tensor:  # as x
    """`halfbyte.ops.rms_norm`, differentiable in `x` and `weight`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: Tensor = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
        return y
    return ops.rms_norm(x, weight, eps, offset)[0]


def layer_norm(
    x: Tensor,  # (..., n)
    weight: Tensor,  # (n,), the dtype of x
    bias: Tensor | None,  # (n,), likewise
    eps: float,
) -> Tensor:  # as x
    """`halfbyte.ops.layer_norm`, differentiable in `x`, `weight` and `bias`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        return y
    return ops.layer_norm(x, weight, bias, eps)[0]
