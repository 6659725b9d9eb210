"""adamw_8bit_step on the compiled kernel."""

from __future__ import annotations

import functools
from array import array

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.formats import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from halfbyte.ops.adamw_step.cpu import kernel_numbers


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
    grads = [grad.contiguous() for grad in grads]
    # The table is read while the call runs, so the array must outlive it: it does, being a local.
    table = array("q", [parameter.numel() for parameter in parameters])
    for tensors in (parameters, grads, exp_avgs, exp_avg_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs):
        table.extend(tensor.data_ptr() for tensor in tensors)
    numbers = kernel_numbers(lr, beta1, beta2, eps, weight_decay, step)
    _C.adamw_8bit_step(len(parameters), table.buffer_info()[0], *_maps(), *numbers, torch.get_num_threads())


@functools.cache
def _maps() -> tuple[_C.DynamicMap, _C.DynamicMap]:
    """The codebooks of m and of v, made ready once: it takes a millisecond."""
    signed, unsigned = (torch.tensor(entries, device="cpu") for entries in (DYNAMIC_SIGNED, DYNAMIC_UNSIGNED))
    return _C.DynamicMap(signed.data_ptr()), _C.DynamicMap(unsigned.data_ptr())
