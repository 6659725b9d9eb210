"""The oracle of attention_backward: the formulas, in plain torch, products in the type of the inputs."""

from __future__ import annotations

from torch import Tensor

from halfbyte.ops.attention.reference import by_group, capped_scores, visible


def attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    scores = capped_scores(q, k, scale, softcap)
    weights = (scores - logsumexp[..., None]).exp().masked_fill(~visible(q, k, segment_start, window), 0.0)
    delta = (dout.float() * out.float()).sum(-1, keepdim=True)
    dscores = weights * ((dout @ by_group(v, heads).transpose(-1, -2)).float() - delta)
    if softcap > 0:
        dscores *= 1 - (scores / softcap).square()
    dscores = (dscores * scale).to(q.dtype)

    def over_group(x: Tensor) -> Tensor:
        batch, _, *rest = x.shape
        return x.float().reshape(batch, kv_heads, heads // kv_heads, *rest).sum(2).to(x.dtype)

    dq = dscores @ by_group(k, heads)
    dk = over_group(dscores.transpose(-1, -2) @ q)
    dv = over_group(weights.to(v.dtype).transpose(-1, -2) @ dout)
    return _by_row(dq), _by_row(dk), _by_row(dv)


def _by_row(x: Tensor) -> Tensor:
    """In memory (batch, row, head, head_dim), as the projections that take the gradients want it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
