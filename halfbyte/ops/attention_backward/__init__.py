"""The gradients of attention. The forward and what its arguments mean: halfbyte/ops/attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.ops import _dispatch
from halfbyte.ops._library import register
from halfbyte.ops.attention._checks import check_attention

_OP = "attention_backward"
_Gradients = tuple[Tensor, Tensor, Tensor]


def attention_backward(
    dout: Tensor,  # (batch, heads, queries, head_dim), any strides
    q: Tensor,  # the forward's arguments,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # and its results
    logsumexp: Tensor,
    segment_start: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> _Gradients:  # dq, dk, dv: as q, k, v; in memory (batch, row, head, head_dim)
    """dS = P ∘ (dO·Vᵀ − rowsum(dO ∘ O)) ∘ (1 − tanh²); dq = scale · dS·K, dk = scale · dSᵀ·Q, dv = Pᵀ·dO.

    The same bits for any number of threads. FlashAttention-2 (arXiv 2307.08691), algorithm 2.
    """
    return cast("_Gradients", _attention_backward(dout, q, k, v, out, logsumexp, segment_start, scale, window, softcap))


def _run(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    segment_start: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> _Gradients:
    check_attention(_OP, q, k, v, segment_start, window, softcap)
    for name, tensor in (("dout", dout), ("out", out)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise HalfbyteError(
                f"{_OP}: {name} is {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}; it must be as q, "
                f"{tuple(q.shape)} of {q.dtype} on {q.device}."
            )
    if logsumexp.shape != q.shape[:3] or logsumexp.dtype != torch.float32:
        raise HalfbyteError(
            f"{_OP}: logsumexp is {tuple(logsumexp.shape)} of {logsumexp.dtype}; "
            f"it must be {tuple(q.shape[:3])} of torch.float32."
        )
    device = "cpu" if q.is_cpu else q.device.type
    result = _dispatch.call(_OP, device, dout, q, k, v, out, logsumexp, segment_start, scale, window, softcap)
    return cast("_Gradients", result)


def _fake(_dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> _Gradients:
    def gradient_of(x: Tensor) -> Tensor:
        batch, heads, rows, head_dim = x.shape
        return x.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)

    return gradient_of(q), gradient_of(k), gradient_of(v)


_attention_backward = register(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, "
    "Tensor? segment_start, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
