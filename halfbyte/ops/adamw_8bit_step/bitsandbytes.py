"""adamw_8bit_step on a CUDA device by bitsandbytes' kernel, which keeps the same codes, maps and blocks.

Its own differences: a code of m never changes the sign of the value, and the weight decay is applied last.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from halfbyte.formats import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED


def adamw_8bit_step(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_absmaxs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_sq_absmaxs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    importlib.import_module("bitsandbytes")  # registers torch.ops.bitsandbytes
    signed, unsigned = _codebooks(parameters[0].device)
    tensors = (parameters, grads, exp_avgs, exp_avg_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs)
    for parameter, grad, m, m_absmax, v, v_absmax in zip(*tensors, strict=True):
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            grad.contiguous(),
            parameter,
            m,
            v,
            beta1,
            beta2,
            0.0,  # beta3 and alpha: another optimizer's
            0.0,
            eps,
            step,
            lr,
            signed,
            unsigned,
            m_absmax,
            v_absmax,
            weight_decay,
            1.0,  # factor on the gradient
            False,  # values of which the gradient is zero are updated too
        )


@functools.cache
def _codebooks(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(DYNAMIC_SIGNED, device=device), torch.tensor(DYNAMIC_UNSIGNED, device=device)
