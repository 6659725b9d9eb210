"""The oracle of rotary: plain torch, on any device."""

from __future__ import annotations

from torch import Tensor

from halfbyte.ops.rotary import empty_like


def rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    half = cos.shape[-1] // 2
    cos_a, cos_b = cos.float()[:, None].chunk(2, -1)
    sin_a, sin_b = sin.float()[:, None].chunk(2, -1)
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    y = empty_like(x)
    y[..., :half] = a * cos_a + b * sin_b if backward else a * cos_a - b * sin_a
    y[..., half : 2 * half] = b * cos_b - a * sin_a if backward else b * cos_b + a * sin_b
    y[..., 2 * half :] = x[..., 2 * half :]
    return y
