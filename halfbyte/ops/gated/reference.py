"""The oracle of gated: plain torch, on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (_value(gate.float(), activation) * up.float()).to(gate.dtype).contiguous()


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, packed: bool) -> Tensor:
    x, g = gate.float(), grad.float()
    grads = g * up.float() * _slope(x, activation), g * _value(x, activation)
    return (torch.cat(grads, -1) if packed else torch.stack(grads)).to(gate.dtype)


def _value(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if activation == "gelu_tanh":
        root = math.sqrt(2 / math.pi)
        s = torch.sigmoid(2 * root * (x + 0.044715 * x**3))
        return s + x * s * (1 - s) * 2 * root * (1 + 3 * 0.044715 * x**2)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
