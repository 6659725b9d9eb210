"""Causal attention with its gradient.

    out = softmax(scale · q·kᵀ) · v

The backward computes the weights again from q, k and the logsumexp of each query's scores, so what is saved beside the
inputs is the output and one number a query and head. What a query sees is said by `segment_start` and `window`: see
halfbyte/ops/attention.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from halfbyte.ops import attention as attention_forward
from halfbyte.ops import attention_backward


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment_start: Tensor | None,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        out, logsumexp = attention_forward(q, k, v, segment_start, scale, window, softcap)
        ctx.save_for_backward(q, k, v, out, logsumexp, segment_start)
        ctx.numbers = scale, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, segment_start = ctx.saved_tensors
        gradients = attention_backward(grads[0], q, k, v, out, logsumexp, segment_start, *ctx.numbers)
        return (*gradients, None, None, None, None)


def attention(
    q: Tensor,  # (batch, heads, queries, head_dim), any strides
    k: Tensor,  # (batch, kv_heads, keys, head_dim)
    v: Tensor,
    segment_start: Tensor | None = None,  # (batch, queries) int32: the first key each query may see
    scale: float | None = None,  # None: 1 / sqrt(head_dim)
    window: int = 0,  # keys a query sees at most, itself included; 0: no limit
    softcap: float = 0.0,  # 0: none
) -> Tensor:
    """`(batch, heads, queries, head_dim)`, laid out so that `.transpose(1, 2)` is contiguous.

    Raises HalfbyteError for shapes or types that do not go together.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(q, k, v, segment_start, scale, window, softcap)  # type: ignore[no-untyped-call]
    return out
