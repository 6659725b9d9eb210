"""Rotary position embedding of queries and keys; nothing is saved but the tables that every layer shares."""

from typing import Any

import torch
from torch import Tensor

from halfbyte import ops


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k = (
            ops.rotary(grad, cos, sin, True) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)
        )
        return grad_q, grad_k, None, None


def rotate_queries_and_keys(
    q: Tensor,  # (batch, heads, length, head_dim)
    k: Tensor,  # (batch, key heads, length, head_dim)
    cos: Tensor,  # (batch or 1, length, rotary_dim), not differentiated
    sin: Tensor,  # likewise
) -> tuple[Tensor, Tensor]:  # as q and k, in their layouts
    """`halfbyte.ops.rotary` of both, differentiable in both."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    return ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
