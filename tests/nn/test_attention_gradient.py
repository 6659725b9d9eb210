"""nn.attention: autograd over the op."""

import pytest
import torch

from halfbyte.nn import attention


@pytest.mark.parametrize("window", [0, 5])
def test_equals_torch_with_gradients(window: int) -> None:
    q, k, v = (torch.randn(2, 40, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    if window:
        seen &= ~torch.ones(40, 40, dtype=torch.bool).tril(-window)
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    out = attention(*transposed, window=window)
    want = torch.nn.functional.scaled_dot_product_attention(*transposed, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(want, (q, k, v), dout)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert mine.is_contiguous()


def test_gradient_of_a_sum_has_no_strides() -> None:
    """`out.sum()` hands back one number, expanded."""
    q, k, v = (torch.randn(1, 2, 9, 32, requires_grad=True) for _ in range(3))
    attention(q, k, v).sum().backward()
    want = q.grad
    q.grad = None
    (attention(q, k, v) * torch.ones(1, 2, 9, 32)).sum().backward()
    assert torch.equal(q.grad, want)


def test_saves_nothing_of_the_size_of_the_scores() -> None:
    saved: list[int] = []
    q, k, v = (torch.randn(1, 2, 300, 32, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attention(q, k, v)
    assert max(saved) == q.numel()


def test_scale_and_cap_reach_the_op() -> None:
    q, k, v = (torch.randn(1, 2, 30, 32) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, scale=32**-0.5), rtol=0, atol=0)
    assert not torch.equal(attention(q, k, v), attention(q, k, v, scale=1.0))
    assert not torch.equal(attention(q, k, v), attention(q, k, v, softcap=1.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_as_one_graph_with_its_backward() -> None:
    q, k, v = (torch.randn(1, 2, 30, 32, requires_grad=True) for _ in range(3))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    want = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
