"""One step of AdamW on many parameters at once, in place.  Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.

m ← m + (1−β₁)·(g − m)        v ← β₂·v + (1−β₂)·g²
p ← p·(1 − lr·λ) − lr/(1−β₁ᵗ) · m / (√v / √(1−β₂ᵗ) + ε)
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "adamw_step"


def adamw_step(
    parameters: list[Tensor],  # float32, contiguous, all on one device
    grads: list[Tensor],  # float32, in the shape of their parameters
    exp_avgs: list[Tensor],  # m: float32, contiguous
    exp_avg_sqs: list[Tensor],  # v: likewise
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,  # λ
    step: int,  # t, from 1
) -> None:
    """Update parameters and moments.  The result does not depend on the number of threads."""
    if parameters:
        _adamw_step(parameters, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, step)


def _run(
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
    device = parameters[0].device
    named = {"parameter": parameters, "gradient": grads, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
    for name, tensors in named.items():
        for tensor, parameter in zip(tensors, parameters, strict=True):
            _checks.check_tensor(_OP, f"a {name}", tensor, torch.float32, parameter.numel(), device)
            if name != "gradient":
                _checks.check_contiguous(_OP, f"a {name}", tensor)
    arguments = (parameters, grads, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, weight_decay, step)
    _dispatch.call(_OP, device.type, *arguments)


def _fake(*_: object) -> None:
    return None


_adamw_step = register(
    "adamw_step(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    _run,
    _fake,
)
