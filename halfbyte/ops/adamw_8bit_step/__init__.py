"""One step of AdamW with moments of 8 bits, in place.  8-bit Optimizers (arXiv 2110.02861), sections 2 and 3.

    m = signed[code] · absmax      v = unsigned[code] · absmax        float32, a block of 256 values at a time
    adamw_step on parameter, m and v                                  with the new moments, before they are rounded
    absmax ← max |m|, code ← nearest entry to m / absmax              and v likewise

`signed` and `unsigned` are the two dynamic maps of halfbyte.formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import OPTIMIZER_BLOCK_SIZE, block_count
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "adamw_8bit_step"


def adamw_8bit_step(
    parameters: list[Tensor],  # float32, contiguous, all on one device; n values each
    grads: list[Tensor],  # float32, in the shape of their parameters
    exp_avgs: list[Tensor],  # m: codes, uint8, contiguous, n values
    exp_avg_absmaxs: list[Tensor],  # (ceil(n/256),) float32
    exp_avg_sqs: list[Tensor],  # v: likewise
    exp_avg_sq_absmaxs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,  # λ
    step: int,  # t, from 1
) -> None:
    """Update parameters and moments.  All zeros are moments of 0.  The number of threads does not show.

    Codes are exact nearest ones, as `quantize_8bit` gives.  A block with a NaN or an infinity becomes NaN whole.
    """
    if parameters:
        tensors = (parameters, grads, exp_avgs, exp_avg_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs)
        _adamw_8bit_step(*tensors, lr, beta1, beta2, eps, weight_decay, step)


def _run(
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
    device = parameters[0].device
    tensors = (parameters, grads, exp_avgs, exp_avg_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs)
    names = ("parameter", "gradient", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
    for of_one in zip(*tensors, strict=True):
        n = of_one[0].numel()
        for name, tensor in zip(names, of_one, strict=True):
            dtype = torch.uint8 if name in ("exp_avg", "exp_avg_sq") else torch.float32
            elements = block_count(n, OPTIMIZER_BLOCK_SIZE) if name.endswith("absmax") else n
            _checks.check_tensor(_OP, f"a {name}", tensor, dtype, elements, device)
            if name != "gradient":
                _checks.check_contiguous(_OP, f"a {name}", tensor)
    _dispatch.call(_OP, device.type, *tensors, lr, beta1, beta2, eps, weight_decay, step)


def _fake(*_: object) -> None:
    return None


_adamw_8bit_step = register(
    "adamw_8bit_step(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_absmaxs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_sq_absmaxs, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    _run,
    _fake,
)
