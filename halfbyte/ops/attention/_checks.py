"""What attention and its backward ask of the tensors they share."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.ops._checks import check_float_dtype

MAX_HEAD_DIM = 256


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, segment_start: Tensor | None, window: int, softcap: float
) -> None:
    check_float_dtype(op, "q", q.dtype)
    if q.ndim != 4 or k.ndim != 4:
        raise HalfbyteError(f"{op}: q has {q.ndim} and k {k.ndim} dimensions; both must have 4.")
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, head_dim):
        raise HalfbyteError(
            f"{op}: k is {tuple(k.shape)} and v {tuple(v.shape)}; both must be ({batch}, kv_heads, keys, {head_dim})."
        )
    if kv_heads == 0 or heads % kv_heads != 0:
        raise HalfbyteError(f"{op}: {kv_heads} key heads do not divide {heads} query heads.")
    if queries > keys:
        raise HalfbyteError(f"{op}: there are {queries} queries and {keys} keys; a query is also a key.")
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise HalfbyteError(f"{op}: head_dim is {head_dim}; it must be from 1 to {MAX_HEAD_DIM}.")
    if window < 0 or softcap < 0:
        raise HalfbyteError(f"{op}: window is {window} and softcap {softcap}; neither may be negative.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise HalfbyteError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}; it must be as q, {q.dtype} on {q.device}."
            )
    if segment_start is not None and (
        segment_start.shape != (batch, queries)
        or segment_start.dtype != torch.int32
        or segment_start.device != q.device
    ):
        raise HalfbyteError(
            f"{op}: segment_start is {tuple(segment_start.shape)} of {segment_start.dtype} on {segment_start.device}; "
            f"it must be ({batch}, {queries}) of torch.int32 on {q.device}."
        )
