"""The output layer and the cross-entropy behind it as one op, which never holds all logits.

A chunk of rows at a time: logits, their loss, and at once the gradient to the hidden states, since softmax minus
one-hot needs nothing from the backward but a factor. The idea is that of Liger Kernel (arXiv 2410.10989, section
3.2) and Cut Cross-Entropy (arXiv 2411.09009).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,  # (n, h), float32, bfloat16 or float16
    weight: Tensor,  # (vocabulary, h), the dtype of hidden
    bias: Tensor | None,  # (vocabulary,), likewise
    targets: Tensor,  # (n,) int64, each in [0, vocabulary)
    logit_scale: float = 1.0,
    softcap: float = 0.0,  # 0: none
    needs_grad: bool = True,  # to hidden
    needs_weight_grad: bool = False,  # to weight and bias; costs float32 memory of their size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss (); gradients to hidden, weight and bias, empty if not needed
    """loss = Σ logsumexp(x) − x[target], x = softcap · tanh(logit_scale · (hidden · weightᵀ + bias) / softcap).

    Logits, and the gradient to them, are rounded to the dtype of `hidden`; all else is float32. The gradient to
    `hidden` is in its dtype, those to weight and bias are summed over the chunks in float32.
    """
    return cast(
        tuple[Tensor, Tensor, Tensor, Tensor],
        _linear_cross_entropy(hidden, weight, bias, targets, logit_scale, softcap, needs_grad, needs_weight_grad),
    )


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float,
    needs_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, h), vocabulary = hidden.shape, weight.shape[0]
    _checks.check_float_dtype(_OP, "hidden", hidden.dtype)
    _checks.check_tensor(_OP, "weight", weight, hidden.dtype, vocabulary * h, hidden.device)
    if bias is not None:
        _checks.check_tensor(_OP, "bias", bias, hidden.dtype, vocabulary, hidden.device)
    _checks.check_tensor(_OP, "targets", targets, torch.int64, n, hidden.device)
    _checks.check_targets(_OP, targets, vocabulary)
    arguments = (hidden, weight, bias, targets, logit_scale, softcap, needs_grad, needs_weight_grad)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], _dispatch.call(_OP, hidden.device.type, *arguments))


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    _targets: Tensor,
    _logit_scale: float,
    _softcap: float,
    needs_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if needs_grad else (0,))
    grad_weight = hidden.new_empty(weight.shape if needs_weight_grad else (0,), dtype=torch.float32)
    has_bias_grad = needs_weight_grad and bias is not None
    grad_bias = hidden.new_empty((weight.shape[0],) if has_bias_grad else (0,), dtype=torch.float32)
    return loss, grad_hidden, grad_weight, grad_bias


_linear_cross_entropy = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float logit_scale, "
    "float softcap, bool needs_grad, bool needs_weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
