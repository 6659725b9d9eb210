"""gated: SwiGLU and GeGLU, values and gradients no further from float32 than the reference."""

import pytest
import torch
from oracle import DTYPES, assert_no_worse, by_reference

from halfbyte import ops
from halfbyte.errors import HalfbyteError

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")
SHAPES = ((1,), (5,), (3, 7), (2, 3, 16), (4, 33), (5, 1536), (2, 0), (0, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_equals_reference(implementation: str, activation: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        gate, up, grad = (4 * torch.randn(shape).to(dtype) for _ in range(3))
        wide = gate.float(), up.float(), activation
        out = ops.gated(gate, up, activation)
        assert ops.executed_implementation() == implementation
        assert_no_worse(out, by_reference(ops.gated, gate, up, activation), by_reference(ops.gated, *wide))
        for packed in (False, True):
            grads = ops.gated_backward(grad, gate, up, activation, packed)
            reference = by_reference(ops.gated_backward, grad, gate, up, activation, packed)
            assert_no_worse(grads, reference, by_reference(ops.gated_backward, grad.float(), *wide, packed))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_size_of_input(implementation: str, activation: str) -> None:
    """From where the gate is shut to where it is open, and the largest numbers: finite, and exact at the ends."""
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e30, -1e30, 1e38, -1e38])])
    up = torch.ones_like(gate)
    out = ops.gated(gate, up, activation)
    torch.testing.assert_close(out, by_reference(ops.gated, gate, up, activation), rtol=2e-6, atol=2e-6)
    assert torch.equal(out[gate > 30], gate[gate > 30])
    small = gate.abs() <= 200  # beyond, the reference itself computes infinity times zero
    grads = ops.gated_backward(up[small], gate[small], up[small], activation)
    expected = by_reference(ops.gated_backward, up[small], gate[small], up[small], activation)
    torch.testing.assert_close(grads, expected, rtol=2e-6, atol=3e-6)
    assert ops.gated_backward(up, gate, up, activation)[0, :-4].isfinite().all()


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_are_those_of_autograd(activation: str) -> None:
    gate, up = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    grad = torch.randn(4, 9)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    functional = torch.nn.functional
    value = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate=approximate)
    expected = torch.stack(torch.autograd.grad(value * up, (gate, up), grad))
    torch.testing.assert_close(ops.gated_backward(grad, gate.detach(), up.detach(), activation), expected)


def test_halves_of_one_tensor(implementation: str) -> None:
    """As Phi-3 has them: no copy is made, and the gradients lie side by side as the halves did."""
    both, grad = torch.randn(3, 5, 40), torch.randn(3, 5, 20)
    gate, up = both.chunk(2, -1)
    expected = ops.gated(gate.contiguous(), up.contiguous(), "silu")
    assert torch.equal(ops.gated(gate, up, "silu"), expected)
    grads = ops.gated_backward(grad, gate, up, "silu")
    assert torch.equal(ops.gated_backward(grad, gate, up, "silu", True), torch.cat(list(grads), -1))
    transposed = torch.randn(20, 5).t()
    assert torch.equal(ops.gated(transposed, up[0], "gelu"), ops.gated(transposed.contiguous(), up[0], "gelu"))


def test_refusals() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(HalfbyteError, match="activation is 'relu'"):
        ops.gated(x, x, "relu")
    with pytest.raises(HalfbyteError, match="up is 16 elements"):
        ops.gated(x, x[:2], "silu")
    with pytest.raises(HalfbyteError, match="grad is 16 elements"):
        ops.gated_backward(x[:2], x, x, "silu")
