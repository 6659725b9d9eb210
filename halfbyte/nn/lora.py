"""A frozen 4-bit layer with a low-rank adapter, forward and backward as a whole.

    y  = x · Wᵀ + t · Bᵀ              t  = s · drop(x) · Aᵀ
    dx = dy · W + drop(dt · A)        dt = s · dy · B          dA = dtᵀ · drop(x)          dB = dyᵀ · t

LoRA (arXiv 2106.09685), equation 3; s is lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA), and drop sets to zero and
scales up what it keeps. Each of y and dx is one product: the low-rank term is r more columns of its sum. Saved for the
backward are x and t; the mask of the dropout is made again from its seed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte import ops
from halfbyte.quant import QuantizedTensor


def lora_linear(
    x: Tensor,  # (..., in), the dtype that products are computed in
    quantized: QuantizedTensor,  # (out, in)
    lora_A: Tensor,  # (r, in), float32 while it is trained
    lora_B: Tensor,  # (out, r), likewise
    scaling: float,  # s
    dropout: float,  # probability that an input is dropped; 0 outside training
) -> Tensor:  # (..., out), the dtype of x
    """The adapters are rounded to the dtype of `x` for products; their gradients are float32 sums, not rounded."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoraLinear.apply(rows, lora_A, lora_B, quantized, scaling, dropout)  # type: ignore[no-untyped-call]
    # The view is made out here: models add to a layer's output in place, which autograd refuses for a view from inside.
    return y.view(*x.shape[:-1], y.shape[-1])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, quantized: QuantizedTensor, scaling: float, dropout: float
    ) -> Tensor:
        drop = ops.Dropout.draw(dropout) if dropout else None
        scale = scaling * drop.scale if drop else scaling
        t = ops.matmul_low_rank(x, lora_A.to(x.dtype), False, scale, drop)
        ctx.save_for_backward(x, t, lora_A, lora_B)
        ctx.quantized, ctx.scale, ctx.drop = quantized, scale, drop
        return quantized.matmul(x, low_rank=(t, lora_B.to(x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, t, lora_A, lora_B = ctx.saved_tensors
        (dy,) = grads
        dx = dA = dB = None
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        if needs_B:
            dB = ops.matmul_low_rank(t.t().contiguous(), dy, True, dtype=torch.float32).t().to(lora_B.dtype)
        if needs_x or needs_A:
            dt = ops.matmul_low_rank(dy, lora_B.to(dy.dtype), True, ctx.scale)
            if needs_A:
                gradient = ops.matmul_low_rank(dt.t().contiguous(), x, True, 1.0, ctx.drop, torch.float32)
                dA = gradient.to(lora_A.dtype)
            if needs_x:
                low_rank = dt, lora_A.to(dy.dtype)
                dx = ctx.quantized.matmul(dy, transpose=True, low_rank=low_rank, dropout=ctx.drop)
        return dx, dA, dB, None, None, None
