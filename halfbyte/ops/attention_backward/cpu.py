"""attention_backward on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops._checks import FLOAT_DTYPES
from halfbyte.ops._memory import empty
from halfbyte.ops.attention.cpu import readable, rows_of, shape_of


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
    dout, q, k, v = readable(dout), readable(q), readable(k), readable(v)
    out, logsumexp = out.transpose(1, 2).contiguous(), logsumexp.contiguous()
    if segment_start is not None:
        segment_start = segment_start.contiguous()
    shape, threads = shape_of(q, k), torch.get_num_threads()
    dq, dk, dv = (empty(x.transpose(1, 2).shape, x.dtype) for x in (q, k, v))
    workspace = empty((_C.attention_backward_workspace_bytes(shape, threads),), torch.uint8)
    _C.attention_backward(
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
        rows_of(dout),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
