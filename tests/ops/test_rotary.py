"""rotary: values and gradients no further from float32 than the reference; layouts, partial rotation, one table."""

import pytest
import torch
from oracle import DTYPES, assert_no_worse, by_reference
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import HalfbyteError

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")


def tables(batch: int, length: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(batch, length, rotary_dim // 2).repeat(1, 1, 2) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_equals_reference(implementation: str, dtype: torch.dtype, backward: bool) -> None:
    for batch, heads, length, head_dim, rotary_dim in (
        (1, 1, 1, 2, 2),
        (2, 3, 5, 64, 64),
        (2, 3, 7, 80, 32),
        (1, 9, 4, 33, 22),
        (3, 2, 33, 128, 128),
        (1, 2, 0, 16, 16),
    ):
        by_position = torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2)
        wider = torch.randn(batch, heads, length, head_dim + 3).to(dtype)[..., :head_dim]
        every_other = torch.randn(batch, heads, length, 2 * head_dim).to(dtype)[..., ::2]
        for x in (by_position, by_position.contiguous(), wider, every_other):
            for table_batch in {1, batch}:
                cos, sin = tables(table_batch, length, rotary_dim, dtype)
                y = ops.rotary(x, cos, sin, backward)
                assert ops.executed_implementation() == implementation
                reference = by_reference(ops.rotary, x, cos, sin, backward)
                exact = by_reference(ops.rotary, x.float(), cos.float(), sin.float(), backward)
                assert_no_worse(y, reference, exact)
                assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:])
        assert ops.rotary(by_position, cos, sin).stride() == by_position.stride()


def test_is_what_models_compute_and_its_transpose() -> None:
    """Against rotate_half as it is written everywhere, differentiated by torch; halves of the tables may differ."""
    x = torch.randn(2, 3, 5, 16, requires_grad=True)
    cos, sin, grad = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 3, 5, 16)
    rotated = torch.cat((-x[..., 8:], x[..., :8]), -1)
    y = x * cos[:, None] + rotated * sin[:, None]
    torch.testing.assert_close(ops.rotary(x.detach(), cos, sin), y.detach())
    torch.testing.assert_close(ops.rotary(grad, cos, sin, True), torch.autograd.grad(y, x, grad)[0])


def test_refusals() -> None:
    x = torch.ones(2, 3, 5, 8)
    for shape in ((2, 5, 7), (2, 5, 10), (3, 5, 8), (5, 8)):
        with pytest.raises(HalfbyteError, match="cos is"):
            ops.rotary(x, torch.ones(shape), torch.ones(shape))
    with pytest.raises(HalfbyteError, match="sin is 40 elements"):
        ops.rotary(x, torch.ones(2, 5, 8), torch.ones(1, 5, 8))
    with pytest.raises(HalfbyteError, match=r"cos is 80 elements of torch\.float32"):
        ops.rotary(x.bfloat16(), torch.ones(2, 5, 8), torch.ones(2, 5, 8))
