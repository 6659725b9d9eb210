"""adamw_step: the reference's numbers on every instruction set, and the same bits on any number of threads."""

import pytest
import torch
from oracle import by_reference
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import HalfbyteError

SIZES = (1, 3, 16, 100, 8191, 8192, 8193, 40_000, 0)
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def state() -> list[list[Tensor]]:
    """Parameters, gradients (some of them zero, some tiny), and moments."""
    generator = torch.Generator().manual_seed(0)
    parameters, grads, exp_avgs, exp_avg_sqs = (
        [torch.randn(size, generator=generator) for size in SIZES] for _ in range(4)
    )
    for grad in grads:
        grad[::7] = 0
        grad[::5] *= 1e-20
    return [parameters, grads, exp_avgs, [v.abs() for v in exp_avg_sqs]]


@pytest.mark.parametrize("step", [1, 1000])
def test_equals_reference(implementation: str, step: int) -> None:
    ours, theirs = state(), state()
    ops.adamw_step(*ours, **SETTINGS, step=step)
    assert ops.executed_implementation() == implementation
    by_reference(lambda: ops.adamw_step(*theirs, **SETTINGS, step=step))
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for grad, before in zip(ours[1], state()[1], strict=True):
        assert torch.equal(grad, before)


def test_thread_count_does_not_show(implementation: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = state()
            ops.adamw_step(*tensors, **SETTINGS, step=3)
            results.append(tensors)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for mine, other in zip(result, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_place_in_the_list_does_not_show(implementation: str) -> None:
    """A value's update depends on nothing but itself: not on its neighbours, nor on where its tensor begins."""
    together, alone = state(), state()
    ops.adamw_step(*together, **SETTINGS, step=3)
    for one in zip(*alone, strict=True):
        ops.adamw_step(*([tensor] for tensor in one), **SETTINGS, step=3)
    for mine, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_strided_gradient(implementation: str) -> None:
    grad = torch.randn(6, 4).t()
    results = []
    for given in (grad, grad.contiguous()):
        parameter, moments = torch.ones(4, 6), [torch.zeros(4, 6) for _ in range(2)]
        ops.adamw_step([parameter], [given], *([m] for m in moments), **SETTINGS, step=1)
        results.append(parameter)
    assert torch.equal(*results)


def test_refusals() -> None:
    one = torch.ones(4)
    with pytest.raises(HalfbyteError, match=r"a gradient is 4 elements of torch\.bfloat16"):
        ops.adamw_step([one], [one.bfloat16()], [one], [one], **SETTINGS, step=1)
    with pytest.raises(HalfbyteError, match="a parameter has strides"):
        ops.adamw_step([torch.ones(2, 3).t()], [torch.ones(6)], [torch.ones(6)], [torch.ones(6)], **SETTINGS, step=1)
    ops.adamw_step([], [], [], [], **SETTINGS, step=1)


def test_torch_sees_one_node() -> None:
    tensors = state()
    torch.library.opcheck(torch.ops.halfbyte.adamw_step.default, (*tensors, 1e-2, 0.9, 0.999, 1e-8, 0.1, 3))
