"""The oracle of adamw_step: plain torch, on any device."""

from __future__ import annotations

import math

from torch import Tensor


def adamw_step(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    step_size = lr / (1 - beta1**step)
    for parameter, grad, exp_avg, exp_avg_sq in zip(parameters, grads, exp_avgs, exp_avg_sqs, strict=True):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
        parameter.mul_(1 - lr * weight_decay)
        parameter.addcdiv_(exp_avg, denominator, value=-step_size)
