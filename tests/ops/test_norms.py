"""rms_norm and layer_norm: values and gradients no further from float32 than the reference."""

import pytest
import torch
from oracle import DTYPES, assert_no_worse, by_reference
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import HalfbyteError

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")
SHAPES = ((1, 1), (3, 7), (2, 5, 16), (4, 33), (2, 3, 2, 64), (9, 576), (2, 2049), (0, 8))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, count: int = 2) -> list[Tensor]:
    """Rows of very different sizes, then vectors for the columns."""
    scale = torch.exp2(torch.randint(-6, 7, (*shape[:-1], 1)).float())
    return [((torch.randn(shape) + 1) * scale).to(dtype), *(torch.randn(shape[-1]).to(dtype) for _ in range(count - 1))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(implementation: str, dtype: torch.dtype, offset: float) -> None:
    for shape in SHAPES:
        x, weight = inputs(shape, dtype)
        grad = torch.randn(shape).to(dtype)
        y, rstd = ops.rms_norm(x, weight, 1e-5, offset)
        assert ops.executed_implementation() == implementation
        exact = by_reference(ops.rms_norm, x.float(), weight.float(), 1e-5, offset)
        assert_no_worse((y, rstd), by_reference(ops.rms_norm, x, weight, 1e-5, offset), exact)
        grad_x = ops.rms_norm_backward(grad, x, weight, rstd, offset)
        reference = by_reference(ops.rms_norm_backward, grad, x, weight, rstd, offset)
        wide = grad.float(), x.float(), weight.float(), exact[1], offset
        assert_no_worse(grad_x, reference, by_reference(ops.rms_norm_backward, *wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(implementation: str, dtype: torch.dtype, biased: bool) -> None:
    for shape in SHAPES:
        x, weight, bias = inputs(shape, dtype, 3)
        arguments = x, weight, bias if biased else None, 1e-5
        grad = torch.randn(shape).to(dtype)
        y, mean, rstd = ops.layer_norm(*arguments)
        assert ops.executed_implementation() == implementation
        exact = by_reference(ops.layer_norm, *(a.float() if isinstance(a, Tensor) else a for a in arguments))
        assert_no_worse((y, mean, rstd), by_reference(ops.layer_norm, *arguments), exact, floor=2e-6)
        if shape[-1] == 1:
            continue  # the gradient is zero but for rounding
        grad_x = ops.layer_norm_backward(grad, x, weight, mean, rstd)
        reference = by_reference(ops.layer_norm_backward, grad, x, weight, mean, rstd)
        wide = grad.float(), x.float(), weight.float(), *exact[1:]
        assert_no_worse(grad_x, reference, by_reference(ops.layer_norm_backward, *wide), floor=2e-6)


def test_gradients_are_those_of_autograd() -> None:
    """The references themselves, against torch's differentiation in float64."""
    x, weight, bias = (t.double().requires_grad_() for t in inputs((5, 24), torch.float32, 3))
    grad = torch.randn(5, 24)
    rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + weight)
    layer = torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-5)
    x32, weight32, bias32 = x.detach().float(), weight.detach().float(), bias.detach().float()
    y, rstd = ops.rms_norm(x32, weight32, 1e-5, 1.0)
    torch.testing.assert_close(y, rms.detach().float(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(rms, x, grad.double())[0].float()
    torch.testing.assert_close(ops.rms_norm_backward(grad, x32, weight32, rstd, 1.0), expected, rtol=1e-4, atol=1e-5)
    y, mean, rstd = ops.layer_norm(x32, weight32, bias32, 1e-5)
    torch.testing.assert_close(y, layer.detach().float(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(layer, x, grad.double())[0].float()
    result = ops.layer_norm_backward(grad, x32, weight32, mean, rstd)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_strided_input(implementation: str) -> None:
    x, weight = torch.randn(6, 4, 20).transpose(0, 1), torch.randn(40)[::2]
    y, rstd = ops.rms_norm(x, weight, 1e-6)
    expected, expected_rstd = ops.rms_norm(x.contiguous(), weight.contiguous(), 1e-6)
    assert torch.equal(y, expected)
    assert torch.equal(rstd, expected_rstd)
    grad = torch.randn(6, 4, 20).transpose(0, 1)
    result = ops.rms_norm_backward(grad, x, weight, rstd)
    assert torch.equal(result, ops.rms_norm_backward(grad.contiguous(), x.contiguous(), weight, rstd))


def test_what_is_not_finite_stays_visible(implementation: str) -> None:
    x = torch.ones(3, 40)
    x[1, 37] = torch.nan
    y, _ = ops.rms_norm(x, torch.ones(40), 1e-6)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


def test_refusals() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(HalfbyteError, match="weight is 7 elements"):
        ops.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(HalfbyteError, match=r"weight is 8 elements of torch\.float32"):
        ops.layer_norm(x.bfloat16(), torch.ones(8), None, 1e-6)
    with pytest.raises(HalfbyteError, match=r"x is torch\.float64"):
        ops.rms_norm(x.double(), torch.ones(8), 1e-6)
    with pytest.raises(HalfbyteError, match="rstd is 2 elements"):
        ops.rms_norm_backward(x, x, torch.ones(8), torch.ones(2))
