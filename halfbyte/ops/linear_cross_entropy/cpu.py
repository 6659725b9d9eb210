"""linear_cross_entropy on the compiled kernels; what few models have, a bias or a weight to train, by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty
from halfbyte.ops.matmul_dense.cpu import multiply_into

# Of logits at a time. More rows a chunk mean that the weight is read less often; beyond this it no longer shows.
CHUNK_BYTES = 32 << 20


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
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (n, h), vocabulary, dtype = hidden.shape, weight.shape[0], hidden.dtype
    has_bias_grad = needs_weight_grad and bias is not None
    losses = torch.empty(n, dtype=torch.float32, device="cpu")
    grad_hidden = empty((n, h) if needs_grad else (0,), dtype)
    grad_weight = torch.zeros(weight.shape if needs_weight_grad else 0, dtype=torch.float32, device="cpu")
    grad_bias = torch.zeros(vocabulary if has_bias_grad else 0, dtype=torch.float32, device="cpu")
    chunks = max(1, -(-n * vocabulary * dtype.itemsize // CHUNK_BYTES))
    rows = max(1, -(-n // chunks))  # all chunks alike, for a short last one would waste its reading of the weight
    buffer = empty((rows, vocabulary), dtype)
    for start in range(0, n, rows):
        part = hidden[start : start + rows]
        logits = buffer[: len(part)]
        if bias is None:
            multiply_into(logits, part, weight, False)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        _C.cross_entropy(
            logits.data_ptr(),
            _checks.FLOAT_DTYPES.index(dtype),
            len(part),
            vocabulary,
            targets[start:].data_ptr(),
            logit_scale,
            softcap,
            needs_grad or needs_weight_grad,
            losses[start:].data_ptr(),
            torch.get_num_threads(),
        )
        if needs_grad:
            multiply_into(grad_hidden[start : start + rows], logits, weight, True)
        if needs_weight_grad:
            grad_weight += logits.t() @ part
        if has_bias_grad:
            grad_bias += logits.sum(0, dtype=torch.float32)
    return losses.sum(), grad_hidden, grad_weight, grad_bias
