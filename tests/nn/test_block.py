"""The differentiable norms, rotation and gated products: torch's own as the oracle, and how little they keep."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.nn import gated, gated_halves, layer_norm, linear_cross_entropy, rms_norm, rotate_queries_and_keys


def rms_by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + weight)


def rotate_by_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

    return one(q), one(k)


HEADS = (2, 3, 5, 8)
TABLES = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)), torch.rand(1, 5, 8)
CASES: dict[str, tuple[Callable[..., object], Callable[..., object], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5, 1.0), rms_by_torch, [(3, 4, 24), (24,)]),
    "layer_norm": (
        lambda x, w, b: layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (24,), w, b, 1e-5),
        [(3, 4, 24), (24,), (24,)],
    ),
    "rotary": (
        lambda q, k: rotate_queries_and_keys(q, k, *TABLES),
        lambda q, k: rotate_by_torch(q, k, *TABLES),
        [HEADS, (2, 1, 5, 8)],
    ),
    "gated": (lambda g, u: gated(g, u, "silu"), lambda g, u: F.silu(g) * u, [(3, 4, 24), (3, 4, 24)]),
    "gated_halves": (
        lambda x: gated_halves(x, "gelu"),
        lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        [(3, 4, 48)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_every_gradient(name: str) -> None:
    ours, theirs, shapes = CASES[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = []
    for function in (ours, theirs):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weighted = sum((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(weighted, leaves)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = ours(*leaves)
        assert torch.equal(again[0] if isinstance(again, tuple) else again, results[0][0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_argument_gets_no_gradient(name: str) -> None:
    ours, _, shapes = CASES[name]
    leaves = [torch.randn(shape, requires_grad=i == 0) for i, shape in enumerate(shapes)]
    outputs = ours(*leaves)
    (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()  # type: ignore[attr-defined]
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


def test_what_is_kept_for_the_backward() -> None:
    """Of a norm: its input and a number a row. Of a gated product: its two inputs. Of a rotation: the tables."""
    kept: list[Tensor] = []
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(32)
    q, cos, sin = torch.randn(2, 3, 5, 8, requires_grad=True), *TABLES
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
        assert [t.numel() for t in kept] == [6 * 32, 32, 6]
        kept.clear()
        gated(x, x, "silu")
        assert [t.data_ptr() for t in kept] == [x.data_ptr()] * 2
        kept.clear()
        rotate_queries_and_keys(q, q, cos, sin)
        assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


@pytest.mark.parametrize("biased", [False, True])
def test_linear_cross_entropy_with_a_trained_output_layer(biased: bool) -> None:
    layer, hidden = nn.Linear(16, 50, bias=biased), torch.randn(9, 16, requires_grad=True)
    targets = torch.randint(50, (9,))
    leaves = [hidden, *layer.parameters()]
    ours = linear_cross_entropy(hidden, layer.weight, layer.bias, targets, softcap=4.0)
    logits = 4 * torch.tanh(layer(hidden) / 4)
    theirs = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    pairs = zip(torch.autograd.grad(0.3 * ours, leaves), torch.autograd.grad(0.3 * theirs, leaves), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
