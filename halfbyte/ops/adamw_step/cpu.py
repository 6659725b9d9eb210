"""adamw_step on the compiled kernel."""

from __future__ import annotations

import math
from array import array

import torch
from torch import Tensor

from halfbyte import _C


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
    grads = [grad.contiguous() for grad in grads]
    # The table is read while the call runs, so the array must outlive it: it does, being a local.
    table = array("q", [parameter.numel() for parameter in parameters])
    for tensors in (parameters, grads, exp_avgs, exp_avg_sqs):
        table.extend(tensor.data_ptr() for tensor in tensors)
    numbers = kernel_numbers(lr, beta1, beta2, eps, weight_decay, step)
    _C.adamw_step(len(parameters), table.buffer_info()[0], *numbers, torch.get_num_threads())


def kernel_numbers(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> tuple[float, float, float, float, float, float, float]:
    """What csrc calls AdamWNumbers: rounded to float32 only there."""
    return (
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        eps,
    )
