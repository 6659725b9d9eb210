"""attention on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops._checks import FLOAT_DTYPES
from halfbyte.ops._memory import empty


def attention(
    q: Tensor, k: Tensor, v: Tensor, segment_start: Tensor | None, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    q, k, v = readable(q), readable(k), readable(v)
    batch, heads, queries, head_dim = q.shape
    shape = shape_of(q, k)
    if segment_start is not None:
        segment_start = segment_start.contiguous()
    out = empty((batch, queries, heads, head_dim), q.dtype)
    logsumexp = torch.empty((batch, heads, queries), dtype=torch.float32, device="cpu")
    workspace = empty((_C.attention_workspace_bytes(shape),), torch.uint8)
    _C.attention(
        shape,
        FLOAT_DTYPES.index(q.dtype),
        rows_of(q),
        rows_of(k),
        rows_of(v),
        0 if segment_start is None else segment_start.data_ptr(),
        window,
        scale,
        softcap,
        out.data_ptr(),
        logsumexp.data_ptr(),
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return out.transpose(1, 2), logsumexp


def readable(x: Tensor) -> Tensor:
    """The kernels take any strides but the last, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def shape_of(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int, int]:
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]


def rows_of(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
