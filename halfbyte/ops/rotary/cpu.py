"""rotary on the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops.rotary import empty_like


def rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = empty_like(x)
    table_stride = cos.stride(0) if cos.shape[0] > 1 else 0
    _C.rotary(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        _checks.FLOAT_DTYPES.index(x.dtype),
        (*x.shape, cos.shape[-1]),
        (*x.stride()[:3], *y.stride()[:3], table_stride, cos.shape[-1]),
        backward,
        torch.get_num_threads(),
    )
    return y
