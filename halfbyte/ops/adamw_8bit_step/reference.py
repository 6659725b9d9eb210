"""The oracle of adamw_8bit_step: plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, OPTIMIZER_BLOCK_SIZE
from halfbyte.ops.adamw_step.reference import adamw_step
from halfbyte.ops.dequantize_8bit.reference import dequantize_8bit
from halfbyte.ops.quantize_8bit.reference import quantize_8bit


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
    device = parameters[0].device
    codebooks = [torch.tensor(entries, device=device) for entries in (DYNAMIC_SIGNED, DYNAMIC_UNSIGNED)]
    codes, absmaxs = (exp_avgs, exp_avg_sqs), (exp_avg_absmaxs, exp_avg_sq_absmaxs)
    for i, parameter in enumerate(parameters):
        stored = [(codes[k][i].view(-1), absmaxs[k][i], codebooks[k]) for k in range(2)]
        m, v = (dequantize_8bit(*moment, OPTIMIZER_BLOCK_SIZE) for moment in stored)
        # Flat, as the moments are; a view, for it is written in place.
        adamw_step([parameter.view(-1)], [grads[i].reshape(-1)], [m], [v], lr, beta1, beta2, eps, weight_decay, step)
        _encode(m, *stored[0])
        _encode(v, *stored[1])


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor) -> None:
    """Write a moment's codes and absmax; a block that is not finite is NaN."""
    blocks = torch.arange(len(values), device=values.device) // OPTIMIZER_BLOCK_SIZE
    broken = torch.zeros(len(absmax), dtype=torch.bool, device=values.device)
    broken[blocks[~values.isfinite()]] = True
    new_codes, new_absmax = quantize_8bit(values.masked_fill(broken[blocks], 0.0), codebook, OPTIMIZER_BLOCK_SIZE)
    codes.copy_(new_codes)
    absmax.copy_(new_absmax.masked_fill(broken, torch.nan))
