"""`matmul_4bit`: `halfbyte.nn.frozen_linear` under bitsandbytes' name and arguments."""

from typing import Any
from warnings import warn

import torch
from torch import Tensor

from halfbyte.nn import frozen_linear

from .._absent import LLM_INT8, absent_class, absent_function
from ..functional import QuantState

MatmulLtState: Any = absent_class("MatmulLtState", LLM_INT8)
matmul = absent_function("matmul", LLM_INT8)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A · Wᵀ + bias`; `A · W`, with a warning, where only the weight's rows fit."""
    if quant_state is None:
        raise ValueError("quant_state is required")
    if len(quant_state.shape) != 2:
        raise ValueError("matmul_4bit: quant_state.shape must be 2D [N, K]")
    rows, columns = quant_state.shape
    turned = A.shape[-1] == rows and rows != columns
    if turned and not torch.compiler.is_compiling():
        warn(
            f"matmul_4bit: quantized as {[rows, columns]}, [K, N]. Re-quantize from the weight as [N, K].",
            DeprecationWarning,
            stacklevel=2,
        )
    y = frozen_linear(A, quant_state.quantized(B), transpose=turned)
    if bias is not None:
        y = y + bias
    return y if out is None else out.copy_(y)
