"""linear_cross_entropy: loss and gradients no further from float32 than with all logits in memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_no_worse, by_reference
from torch import Tensor

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError
from halfbyte.ops.linear_cross_entropy import cpu

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")


def inputs(n: int, h: int, vocabulary: int, dtype: torch.dtype, biased: bool = False) -> tuple[Any, ...]:
    hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(vocabulary, h) / h**0.5 * 3).to(dtype)
    bias = torch.randn(vocabulary).to(dtype) if biased else None
    return hidden, weight, bias, torch.randint(vocabulary, (n,))


def widened(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_equals_reference(
    implementation: str, dtype: torch.dtype, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 40_000)  # several chunks
    for n, h, vocabulary, biased in ((1, 8, 3, False), (7, 33, 1025, True), (40, 64, 5003, False), (0, 8, 16, True)):
        arguments = (*inputs(n, h, vocabulary, dtype, biased), 0.8, softcap, True, True)
        result = ops.linear_cross_entropy(*arguments)
        assert n == 0 or ops.executed_implementation() == implementation
        reference = by_reference(ops.linear_cross_entropy, *arguments)
        exact = by_reference(ops.linear_cross_entropy, *widened(arguments))
        # The gradients to weight and bias are sums over chunks, each rounded; the reference has one.
        slack = (0.02, 0.02, 0.5, 0.5)
        for ours, theirs, oracle, share in zip(result, reference, exact, slack, strict=True):
            assert_no_worse(ours, theirs, oracle, slack=share, floor=3e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_is_cross_entropy(softcap: float) -> None:
    """Against torch's own, differentiated by torch."""
    hidden, weight, bias, targets = inputs(12, 24, 100, torch.float32, True)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = 0.5 * F.linear(*leaves)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, reduction="sum")
    loss, *grads = ops.linear_cross_entropy(hidden, weight, bias, targets, 0.5, softcap, True, True)
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_computed(implementation: str) -> None:
    arguments = inputs(5, 16, 50, torch.float32)
    loss, *grads = ops.linear_cross_entropy(*arguments, needs_grad=False)
    assert [grad.numel() for grad in grads] == [0, 0, 0]
    full = ops.linear_cross_entropy(*arguments)
    assert torch.equal(full[0], loss)
    assert full[1].shape == (5, 16)
    assert full[2].numel() == 0


def test_large_logits(implementation: str) -> None:
    """One logit far above the others, at either end of the row; one far below; steps in the running maximum."""
    vocabulary = 3000
    logits = torch.zeros(4, vocabulary)
    logits[0, -1], logits[1, 0], logits[2, 7] = 300.0, 1e30, -1e30
    logits[3] = torch.arange(vocabulary) - 1500.0
    targets = torch.tensor([vocabulary - 1, 1, 7, 0])
    expected = F.cross_entropy(logits, targets, reduction="none")
    gradient = torch.softmax(logits, -1) - F.one_hot(targets, vocabulary)
    losses = torch.empty(4)
    _C.cross_entropy(logits.data_ptr(), 0, 4, vocabulary, targets.data_ptr(), 1.0, 0.0, True, losses.data_ptr(), 1)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits, gradient)


def test_a_logit_that_is_not_a_number_shows(implementation: str) -> None:
    hidden, weight, bias, targets = inputs(6, 16, 2000, torch.float32)
    for bad in (torch.nan, torch.inf):
        broken = weight.clone()
        broken[1234] = bad
        assert not ops.linear_cross_entropy(hidden, broken, bias, targets)[0].isfinite()


def test_strided_input(implementation: str) -> None:
    hidden, weight, _, targets = inputs(6, 16, 50, torch.float32)
    doubled = torch.stack((targets, targets), 1)[:, 0]
    strided = ops.linear_cross_entropy(hidden.t().contiguous().t(), weight.t().contiguous().t(), None, doubled)
    for ours, expected in zip(strided, ops.linear_cross_entropy(hidden, weight, None, targets), strict=True):
        assert torch.equal(ours, expected)


def test_refusals() -> None:
    hidden, weight, _, targets = inputs(6, 16, 50, torch.float32)
    for bad in (-100, 50):
        with pytest.raises(HalfbyteError, match=r"must be in \[0, 50\)"):
            ops.linear_cross_entropy(hidden, weight, None, torch.full_like(targets, bad))
    with pytest.raises(HalfbyteError, match=r"weight is 800 elements of torch\.bfloat16"):
        ops.linear_cross_entropy(hidden, weight.bfloat16(), None, targets)
