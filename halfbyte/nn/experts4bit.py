"""A mixture's experts with their weights frozen in 4 bits, and low-rank adapters on them.

transformers keeps all experts of a layer in two tensors of three dimensions, for the products before and after the
activation. A token goes through k of the E experts that its router chose, weighted:

    y = Σ p_e · down_e(activate(up_e(x)))          e among the k chosen

The chosen pairs of token and expert are sorted by expert, so that each expert has one product, on codes that are a part
of the packed tensor and are not copied. With an adapter, LoRA's of PEFT's `target_parameters`, expert e computes

    y = x · W_eᵀ + t · B_eᵀ          t = x · A_eᵀ
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfbyte import ops
from halfbyte.nn.packed import PackedWeights
from halfbyte.quant import QuantizedTensor

LowRank = tuple[Tensor, Tensor]  # A (experts, r, in) and B (experts, out, r), B with LoRA's scaling in it


class Experts4bit(PackedWeights):
    """The experts of one layer.  `(tokens, hidden)` to `(tokens, hidden)`, as transformers' own class.

    What its activation needs (`act_fn`, limits, biases) are attributes under the names of the class that it replaces.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, int, int]],
        activate: Callable[[nn.Module, Tensor], Tensor],
        *,
        is_transposed: bool = False,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            shapes: of the two weights by name, the one before the activation first: `(experts, out, in)`.
            activate: of this module and the first product; a function that can be pickled.
            is_transposed: the shapes are `(experts, in, out)`.
        """
        super().__init__()
        self._make_room(shapes, quant_type, block_size, double_quant, compute_dtype, device)
        self.up_name, self.down_name = shapes
        self.num_experts = shapes[self.up_name][0]
        self.activate = activate
        self.is_transposed = is_transposed
        self.low_rank: dict[str, LowRank] = {}  # by weight, while a forward with adapters runs

    def forward(
        self,
        hidden_states: Tensor,  # (tokens, hidden)
        top_k_index: Tensor,  # (tokens, k) integers
        top_k_weights: Tensor,  # (tokens, k)
    ) -> Tensor:
        chosen = top_k_index.flatten()
        experts, order = chosen.sort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        # index_select, whose backward adds up in a fixed order.
        x = hidden_states.index_select(0, order // top_k_index.shape[1]).to(self.compute_dtype)
        y = self.activate(self, self._product(self.up_name, x, experts, counts))
        y = self._product(self.down_name, y, experts, counts)
        y = y * top_k_weights.flatten()[order, None]
        y = y.index_select(0, order.argsort()).view(*top_k_index.shape, y.shape[1]).sum(1)
        return y.to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, experts: Tensor, counts: list[int]) -> Tensor:
        lora_A, lora_B = self.low_rank.get(name, (None, None))
        x = x.to(self.compute_dtype)
        y: Tensor = _ExpertProducts.apply(  # type: ignore[no-untyped-call]
            x, lora_A, lora_B, self.get_quantized(name), self.is_transposed, counts
        )
        bias = getattr(self, f"{name}_bias", None)
        return y if bias is None else y + bias[experts].to(y.dtype)


class _ExpertProducts(torch.autograd.Function):
    """The rows of x, sorted by expert, each times the weight of its expert; gradients to x, A and B alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (pairs, in)
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        quantized: QuantizedTensor,
        is_transposed: bool,
        counts: Sequence[int],  # rows of each expert
    ) -> Tensor:  # (pairs, out)
        ctx.quantized, ctx.is_transposed, ctx.counts = quantized, is_transposed, counts
        out_features = quantized.shape[2 if is_transposed else 1]
        y = x.new_empty(x.shape[0], out_features)
        t = None if lora_A is None else x.new_empty(x.shape[0], lora_A.shape[1])
        for expert, rows in _rows(counts):
            low_rank = None
            if lora_A is not None and lora_B is not None and t is not None:
                t[rows] = ops.matmul_dense(x[rows], lora_A[expert].to(x.dtype))
                low_rank = t[rows], lora_B[expert].to(x.dtype)
            y[rows] = _multiply(x[rows], quantized.part(expert), is_transposed, low_rank)
        if t is not None:
            ctx.save_for_backward(x, t, lora_A, lora_B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy,) = grads
        dy = dy.contiguous()
        quantized, is_transposed = ctx.quantized, ctx.is_transposed
        in_features = quantized.shape[1 if is_transposed else 2]
        dx = dy.new_empty(dy.shape[0], in_features) if ctx.needs_input_grad[0] else None
        dA = dB = None
        saved = ctx.saved_tensors  # once: a checkpoint computes them when they are asked for
        if saved:
            x, t, lora_A, lora_B = saved
            dA, dB = torch.zeros_like(lora_A), torch.zeros_like(lora_B)  # of experts that nobody chose, too
        for expert, rows in _rows(ctx.counts):
            low_rank = None
            if dA is not None and dB is not None:
                dt = ops.matmul_dense(dy[rows], lora_B[expert].to(dy.dtype).contiguous(), True)
                dA[expert] = ops.matmul_dense(dt.t().contiguous(), x[rows], True, dtype=torch.float32)
                dB[expert] = ops.matmul_dense(t[rows].t().contiguous(), dy[rows], True, dtype=torch.float32).t()
                low_rank = dt, lora_A[expert].to(dy.dtype).t()
            if dx is not None:
                dx[rows] = _multiply(dy[rows], quantized.part(expert), not is_transposed, low_rank)
        return dx, dA, dB, None, None, None


def _rows(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """The experts that were chosen, and which rows are theirs."""
    ends = accumulate(counts)
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]


def _multiply(
    x: Tensor,  # (rows, in)
    weight: QuantizedTensor | Tensor,  # (out, in), or (in, out) when transposed
    transpose: bool,
    low_rank: LowRank | None,  # t (rows, r) and B (out, r)
) -> Tensor:  # (rows, out)
    """x · Wᵀ + t · Bᵀ, or x · W + t · Bᵀ when transposed."""
    if isinstance(weight, QuantizedTensor):
        if low_rank is not None:
            t, lora_B = low_rank
            low_rank = t, (lora_B.t() if transpose else lora_B).contiguous()
        return weight.matmul(x, transpose, low_rank)
    dense = weight.to(x.dtype)
    y = x @ (dense if transpose else dense.t())
    return y if low_rank is None else y + low_rank[0] @ low_rank[1].t()
