"""How the left operand of a compiled product has to lie in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """`(..., n)` as rows whose values are neighbours.

    bf16 values are multiplied in pairs, so there a row of odd length is completed with a zero.
    """
    x = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.bfloat16 and x.shape[-1] % 2:
        return F.pad(x, (0, 1))
    return x if x.stride(-1) == 1 else x.contiguous()
