"""activation(gate) * up as one operation that keeps its two inputs and nothing else."""

from typing import Any

import torch
from torch import Tensor

from halfbyte import ops


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ops.gated_backward(grads[0], gate, up, ctx.activation)
        return grad_gate, grad_up, None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, -1)
        return ops.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        return ops.gated_backward(grads[0], gate, up, ctx.activation, True), None


def gated(
    gate: Tensor,  # (..., n)
    up: Tensor,  # likewise
    activation: str,  # one of halfbyte.ops.ACTIVATIONS
) -> Tensor:  # (..., n)
    """`halfbyte.ops.gated`, differentiable in both."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
        return out
    return ops.gated(gate, up, activation)


def gated_halves(
    gate_up: Tensor,  # (..., 2n): the gate, then what it lets through
    activation: str,
) -> Tensor:  # (..., n)
    """`gated` of the two halves, with one gradient for both."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        out: Tensor = _GatedHalves.apply(gate_up, activation)  # type: ignore[no-untyped-call]
        return out
    gate, up = gate_up.chunk(2, -1)
    return ops.gated(gate, up, activation)
