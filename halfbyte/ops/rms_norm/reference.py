"""The oracle of rms_norm: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd * (offset + weight.float())
    return y.to(x.dtype).contiguous(), rstd.reshape(-1)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    scale = rstd.view(*x.shape[:-1], 1)
    z = x.float() * scale
    g = grad.view(x.shape).float() * (offset + weight.float())
    return (scale * (g - z * (g * z).mean(-1, keepdim=True))).to(x.dtype).contiguous()
