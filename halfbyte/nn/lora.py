"""Frozen 4-bit layers with low-rank adapters, forward and backward as a whole: one, or several that read one input.

    y  = x · Wᵀ + t · Bᵀ              t  = s · drop(x) · Aᵀ
    dx = dy · W + drop(dt · A)        dt = s · dy · B          dA = dtᵀ · drop(x)          dB = dyᵀ · t

LoRA (arXiv 2106.09685), equation 3; s is lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA), and drop sets to zero and
scales up what it keeps. Each of y and dx is one product: the low-rank term is r more columns of its sum. Saved for the
backward are x and t; the mask of the dropout is made again from its seed.

Layers that share x (q, k and v; gate and up) read it once for all their A, forward and backward, see it through one
mask, and have one dx, which is a single sum.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte import ops
from halfbyte.quant import QuantizedTensor, matmul_sum


def lora_linear(
    x: Tensor,  # (..., in), the dtype that products are computed in
    quantized: QuantizedTensor,  # (out, in)
    lora_A: Tensor,  # (r, in), float32 while it is trained
    lora_B: Tensor,  # (out, r), likewise
    scaling: float,  # s
    dropout: float,  # probability that an input is dropped; 0 outside training
) -> Tensor:  # (..., out), the dtype of x
    """The adapters are rounded to the dtype of `x` for products; their gradients are float32 sums, not rounded."""
    return lora_linears(x, [quantized], [(lora_A, lora_B)], scaling, dropout)[0]


def lora_linears(
    x: Tensor,  # (..., in)
    quantized: Sequence[QuantizedTensor],  # each (out, in), with an `out` of its own; at most eight, stored alike
    adapters: Sequence[tuple[Tensor, Tensor]],  # for each A (r, in) and B (out, r), with an r of its own
    scaling: float,
    dropout: float,
) -> tuple[Tensor, ...]:  # each (..., out)
    """`lora_linear` for layers that share their input and its dropout."""
    rows = x.reshape(-1, x.shape[-1])
    factors = [factor for adapter in adapters for factor in adapter]
    ys: tuple[Tensor, ...] = _LoraLinears.apply(rows, quantized, scaling, dropout, *factors)  # type: ignore[no-untyped-call]
    # The view is made out here: models add to a layer's output in place, which autograd refuses for a view from inside.
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _LoraLinears(torch.autograd.Function):
    """`factors` are A and B of each layer in turn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: Sequence[QuantizedTensor], scaling: float, dropout: float, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        drop = ops.Dropout.draw(dropout) if dropout else None
        scale = scaling * drop.scale if drop else scaling
        t = ops.matmul_dense(x, _stacked(factors[::2]).to(x.dtype), False, scale, drop)
        ctx.save_for_backward(x, t, *factors)
        ctx.quantized, ctx.scale, ctx.drop = quantized, scale, drop
        return tuple(
            weight.matmul(x, low_rank=(t[:, ranks], lora_B.to(x.dtype)))
            for weight, lora_B, ranks in zip(quantized, factors[1::2], _ranks(factors), strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, t, *factors = ctx.saved_tensors
        ranks, dtype = _ranks(factors), x.dtype
        needs_x, needs_A, needs_B = ctx.needs_input_grad[0], ctx.needs_input_grad[4::2], ctx.needs_input_grad[5::2]
        gradients: list[Tensor | None] = [None] * len(factors)
        if any(needs_B):
            across = t.t().contiguous()
            for i, dy in enumerate(dys):
                dB = ops.matmul_dense(across[ranks[i]], dy, True, dtype=torch.float32).t()
                gradients[2 * i + 1] = dB.to(factors[2 * i + 1].dtype)
        dx: Tensor | None = None
        if needs_x or any(needs_A):
            dts = [
                ops.matmul_dense(dy, lora_B.to(dtype), True, ctx.scale)
                for dy, lora_B in zip(dys, factors[1::2], strict=True)
            ]
            if any(needs_A):
                across = _stacked([dt.t() for dt in dts]).contiguous()
                dA = ops.matmul_dense(across, x, True, 1.0, ctx.drop, torch.float32)
                gradients[::2] = [dA[rank].to(lora_A.dtype) for rank, lora_A in zip(ranks, factors[::2], strict=True)]
            if needs_x:
                low_rank = _stacked(dts, dim=1), _stacked(factors[::2]).to(dtype)
                dx = matmul_sum(dys, ctx.quantized, low_rank, ctx.drop)
        return dx, None, None, None, *gradients


def _ranks(factors: Sequence[Tensor]) -> list[slice]:
    """Which columns of all layers' t are whose."""
    ends = accumulate((lora_A.shape[0] for lora_A in factors[::2]), initial=0)
    return [slice(begin, end) for begin, end in pairwise(ends)]


def _stacked(matrices: Sequence[Tensor], dim: int = 0) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices), dim)
