"""The oracle of matmul_dense: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.ops._dropout import STEPS, Dropout


def matmul_dense(
    x: Tensor, w: Tensor, transpose: bool, scale: float, seed: int, threshold: int, dtype: torch.dtype
) -> Tensor:
    if threshold:
        dropped = w if transpose else x
        kept = Dropout(seed, threshold / STEPS).kept(dropped.shape[0], dropped.shape[1], dropped.device)
        dropped = torch.where(kept, dropped, 0.0)
        x, w = (x, dropped) if transpose else (dropped, w)
    x, w = x.to(dtype), w.to(dtype)
    return x @ (w if transpose else w.t()) * scale
