"""activation(gate) * up, forward and backward: SwiGLU and GeGLU.  Shazeer (arXiv 2002.05202)."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._library import register

_OP = "gated"

# By their order they are numbered in csrc/block.hpp: x·sigmoid(x); GELU by its tanh approximation; GELU by erf.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def gated(
    gate: Tensor,  # (..., n), float32, bfloat16 or float16; rows may be apart, as halves of a wider tensor are
    up: Tensor,  # the same shape and dtype
    activation: str,  # one of ACTIVATIONS
) -> Tensor:  # as gate, contiguous
    """activation(gate) * up, in float32, rounded once."""
    return cast(Tensor, _gated(gate, up, activation))


def gated_backward(
    grad: Tensor,  # of the output
    gate: Tensor,
    up: Tensor,
    activation: str,
    packed: bool = False,
) -> Tensor:  # (2, ..., n): the gradients to gate and to up; packed: (..., 2n), a row of one beside a row of the other
    """Both gradients, with the activation computed again from `gate`."""
    return cast(Tensor, _gated_backward(grad, gate, up, activation, packed))


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    _checks.check_float_dtype(_OP, "gate", gate.dtype)
    _checks.check_tensor(_OP, "up", up, gate.dtype, gate.numel(), gate.device)
    if activation not in ACTIVATIONS:
        raise HalfbyteError(f"{_OP}: activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}.")


def _run(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return cast(Tensor, _dispatch.call(_OP, gate.device.type, gate, up, activation))


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, packed: bool) -> Tensor:
    _check(gate, up, activation)
    _checks.check_tensor(_OP, "grad", grad, gate.dtype, gate.numel(), gate.device)
    return cast(Tensor, _dispatch.call("gated_backward", gate.device.type, grad, gate, up, activation, packed))


def _fake(gate: Tensor, _up: Tensor, _activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(_grad: Tensor, gate: Tensor, _up: Tensor, _activation: str, packed: bool) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]) if packed else (2, *gate.shape))


_gated = register("gated(Tensor gate, Tensor up, str activation) -> Tensor", _run, _fake)
_gated_backward = register(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str activation, bool packed) -> Tensor",
    _run_backward,
    _fake_backward,
)
