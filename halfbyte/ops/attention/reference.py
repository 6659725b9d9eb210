"""The oracle of attention: plain torch, on any device, with the scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, segment_start: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    scores = capped_scores(q, k, scale, softcap)
    scores = scores.masked_fill(~visible(q, k, segment_start, window), -torch.inf)
    logsumexp = scores.logsumexp(-1)
    weights = (scores - logsumexp[..., None]).exp().to(v.dtype)
    out = weights @ by_group(v, q.shape[1])
    # Laid out as the reshape to (batch, queries, heads * head_dim) that follows wants it.
    return out.transpose(1, 2).contiguous().transpose(1, 2), logsumexp


def by_group(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, keys, head_dim) -> (batch, heads, keys, head_dim): each head beside its queries."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def capped_scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """(batch, heads, queries, keys) float32."""
    scores = (q @ by_group(k, q.shape[1]).transpose(-1, -2)).float() * scale
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def visible(q: Tensor, k: Tensor, segment_start: Tensor | None, window: int) -> Tensor:
    """(batch or 1, 1, queries, keys) bool."""
    queries, keys = q.shape[2], k.shape[2]
    key = torch.arange(keys, device=q.device)
    position = torch.arange(keys - queries, keys, device=q.device)[:, None]
    seen = key <= position
    if window > 0:
        seen &= key > position - window
    if segment_start is not None:
        seen = seen & (key >= segment_start[:, None, :, None])
    return seen | (key == position)
