"""The oracle of layer_norm: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).contiguous(), mean.reshape(-1), rstd.reshape(-1)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    scale = rstd.view(*x.shape[:-1], 1)
    z = (x.float() - mean.view(*x.shape[:-1], 1)) * scale
    g = grad.view(x.shape).float() * weight.float()
    centered = g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)
    return (scale * centered).to(x.dtype).contiguous()
