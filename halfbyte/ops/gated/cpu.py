"""gated on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _C
from halfbyte.ops import _checks
from halfbyte.ops._memory import empty
from halfbyte.ops.gated import ACTIVATIONS


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    out = empty(gate.shape, gate.dtype)
    _C.gated_forward(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        _checks.FLOAT_DTYPES.index(gate.dtype),
        ACTIVATIONS.index(activation),
        _checks.row_count(gate),
        gate.shape[-1],
        gate_stride,
        up_stride,
        torch.get_num_threads(),
    )
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, packed: bool) -> Tensor:
    grad = grad.contiguous()
    gate, gate_stride = _rows(gate)
    up, up_stride = _rows(up)
    rows, columns = _checks.row_count(gate), gate.shape[-1]
    shape = (*gate.shape[:-1], 2 * columns) if packed else (2, *gate.shape)
    grads = empty(shape, gate.dtype)
    second = (columns if packed else rows * columns) * grads.element_size()
    _C.gated_backward(
        grad.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        grads.data_ptr(),
        grads.data_ptr() + second,
        _checks.FLOAT_DTYPES.index(gate.dtype),
        ACTIVATIONS.index(activation),
        rows,
        columns,
        gate_stride,
        up_stride,
        2 * columns if packed else columns,
        torch.get_num_threads(),
    )
    return grads


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` with adjacent values and evenly spaced rows, and the values from one row to the next; a copy if need be."""
    if x.ndim < 2 or x.is_contiguous():
        return x.contiguous(), x.shape[-1]
    stride = x.stride(-2)
    even = x.stride(-1) == 1 and all(x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(x.ndim - 2))
    return (x, stride) if even else (x.contiguous(), x.shape[-1])
