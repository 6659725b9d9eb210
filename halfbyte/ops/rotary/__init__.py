"""Rotary position embedding in the half-rotation convention of Llama and GPT-NeoX.  Su et al. (arXiv 2104.09864)."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "rotary"


def rotary(
    x: Tensor,  # (batch, heads, length, head_dim), any strides with the last 1
    cos: Tensor,  # (batch or 1, length, rotary_dim), the dtype of x; rotary_dim even, at most head_dim
    sin: Tensor,  # likewise
    backward: bool = False,  # the transposed rotation: by minus the angle
) -> Tensor:  # as x, in the same layout
    """With a, b the halves of a head's first rotary_dim values: (a·cos − b·sin, b·cos + a·sin); the rest is copied.

    In float32, rounded once.
    """
    return cast(Tensor, _rotary(x, cos, sin, backward))


def _run(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    _checks.check_float_dtype(_OP, "x", x.dtype)
    batch, _, length, head_dim = x.shape
    rotary_dim = cos.shape[-1]
    if cos.ndim != 3 or cos.shape[0] not in (1, batch) or rotary_dim % 2 or rotary_dim > head_dim:
        raise HalfbyteError(
            f"{_OP}: cos is {tuple(cos.shape)}; it must be (1 or {batch}, {length}, an even number up to {head_dim})."
        )
    elements = cos.shape[0] * length * rotary_dim
    _checks.check_tensor(_OP, "cos", cos, x.dtype, elements, x.device)
    _checks.check_tensor(_OP, "sin", sin, x.dtype, elements, x.device)
    return cast(Tensor, _dispatch.call(_OP, x.device.type, x, cos, sin, backward))


def _fake(x: Tensor, _cos: Tensor, _sin: Tensor, _backward: bool) -> Tensor:
    return empty_like(x)


def empty_like(x: Tensor) -> Tensor:
    """Memory for the result: dense, in the order of dimensions that `x` has."""
    # Heads that were split from a projection's output lie position by position, and whoever reads them next
    # (attention, or the projection's backward) wants them so again.
    if x.stride(1) < x.stride(2):
        batch, heads, length, head_dim = x.shape
        return x.new_empty((batch, length, heads, head_dim)).transpose(1, 2)
    return x.new_empty(x.shape)


_rotary = register("rotary(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor", _run, _fake)
