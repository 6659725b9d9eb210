"""Causal attention over packed, padded, windowed or cached rows, without a mask in memory.

A batch of queries may stand at the end of a longer row of keys (a cache): query i is at position p = i + keys − queries
and sees the keys [max(segment_start[b, i], p − window + 1), p], itself always among them. That one number a query says
everything that transformers writes as a (queries × keys) mask:

    packed rows     segment_start = first position of the query's own row: attention is block-diagonal
    left padding    segment_start = number of padding tokens
    right padding   nothing to say: no earlier query sees it. Starts equal to the padding's own positions save the work.

Nothing of size queries × keys is kept: the backward gets `out` and `logsumexp` and computes the weights again.
FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2; soft-capping as in Gemma 2 (arXiv 2408.00118), section 2.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.ops import _dispatch
from halfbyte.ops._library import register
from halfbyte.ops.attention._checks import check_attention

_OP = "attention"


def attention(
    q: Tensor,  # (batch, heads, queries, head_dim), any strides; float32, bfloat16 or float16
    k: Tensor,  # (batch, kv_heads, keys, head_dim); kv_heads divides heads, queries <= keys
    v: Tensor,  # as k
    segment_start: Tensor | None,  # (batch, queries) int32: the first key each query may see; None: key 0
    scale: float,  # of q·k; 1 / sqrt(head_dim) in most models
    window: int,  # keys a query sees at most, itself included; 0: no limit
    softcap: float,  # score = softcap · tanh(score / softcap); 0: none
) -> tuple[Tensor, Tensor]:  # (batch, heads, queries, head_dim), in memory (batch, queries, heads, head_dim);
    #                          logsumexp of the scores, (batch, heads, queries) float32
    """out = softmax(softcap · tanh(scale · q·kᵀ / softcap)) · v over the keys each query sees.

    Raises HalfbyteError for shapes or types that do not go together and for head_dim above 256.
    """
    return cast("tuple[Tensor, Tensor]", _attention(q, k, v, segment_start, scale, window, softcap))


def _run(
    q: Tensor, k: Tensor, v: Tensor, segment_start: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    check_attention(_OP, q, k, v, segment_start, window, softcap)
    device = "cpu" if q.is_cpu else q.device.type
    result = _dispatch.call(_OP, device, q, k, v, segment_start, scale, window, softcap)
    return cast("tuple[Tensor, Tensor]", result)


def _fake(
    q: Tensor, _k: Tensor, _v: Tensor, _segment_start: Tensor | None, _scale: float, _window: int, _softcap: float
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty((batch, queries, heads, head_dim)).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


_attention = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? segment_start, float scale, int window, float softcap) "
    "-> (Tensor, Tensor)",
    _run,
    _fake,
)
