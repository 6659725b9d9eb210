"""The oracle of linear_cross_entropy: plain torch with all logits in memory, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float,
    needs_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    x = logits.float() * logit_scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, targets, reduction="sum") if len(targets) else x.new_zeros(())
    grad_hidden, grad_weight, grad_bias = hidden.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs_grad or needs_weight_grad:
        grad = torch.softmax(x, -1)
        grad[torch.arange(len(targets), device=targets.device), targets] -= 1
        slope = logit_scale * (1 - (x / softcap).square()) if softcap else logit_scale
        grad = (grad * slope).to(hidden.dtype)
        if needs_grad:
            grad_hidden = grad @ weight
        if needs_weight_grad:
            grad_weight = grad.float().T @ hidden.float()
            grad_bias = grad.float().sum(0) if bias is not None else grad_bias
    return loss, grad_hidden, grad_weight, grad_bias
