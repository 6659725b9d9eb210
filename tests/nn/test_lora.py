"""lora_linear is x · Wᵀ + s·B·A·drop(x), with the gradients of that; nothing but x and t is kept for them."""

import pytest
import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.nn import lora as module
from halfbyte.nn import lora_linear, lora_linears
from halfbyte.quant import QuantizedTensor, quantize_4bit

SCALING = 2.0


def layer(out: int, into: int, rank: int) -> tuple[QuantizedTensor, Tensor, Tensor]:
    quantized = quantize_4bit(torch.randn(out, into) * 0.05)
    lora_A = (torch.randn(rank, into) * 0.1).requires_grad_()
    lora_B = (torch.randn(out, rank) * 0.1).requires_grad_()
    return quantized, lora_A, lora_B


def plain(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, kept: Tensor | None = None, scale: float = SCALING
) -> Tensor:
    dropped = x if kept is None else torch.where(kept.view(x.shape), x, 0.0)
    return x @ weight.t() + scale * (dropped @ lora_A.t() @ lora_B.t())


def gradients(y: Tensor, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 64, 96, 16), (1, 1, 7, 13, 2), (2, 70, 33, 576, 8)], ids=str)
def test_no_further_from_float32_than_plain_lora_in_the_same_dtype(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, dropout: float
) -> None:
    batch, length, out, into, rank = shape
    quantized, lora_A, lora_B = layer(out, into, rank)
    x = torch.randn(batch, length, into).to(dtype).requires_grad_()
    dy = torch.randn(batch, length, out).to(dtype)
    torch.manual_seed(11)
    ours = gradients(lora_linear(x, quantized, lora_A, lora_B, SCALING, dropout), dy, x, lora_A, lora_B)

    torch.manual_seed(11)
    drop = ops.Dropout.draw(dropout)
    kept, scale = (drop.kept(batch * length, into), SCALING * drop.scale) if dropout else (None, SCALING)
    weight = quantized.dequantize(dtype)
    rounded = lora_A.to(dtype), lora_B.to(dtype)
    same = gradients(plain(x, weight, *rounded, kept, scale), dy, x, lora_A, lora_B)
    wide = [t.detach().double().requires_grad_() for t in (x, *rounded)]
    exact = gradients(plain(wide[0], weight.double(), wide[1], wide[2], kept, scale), dy.double(), *wide)
    for got, reference, truth in zip(ours, same, exact, strict=True):
        assert got.shape == truth.shape
        error, allowed = (got.double() - truth).norm(), (reference.double() - truth).norm()
        # Slack: t and dt are rounded in one place here and in another there.
        assert error <= 1.1 * allowed + 4e-6 * truth.norm()
    assert ours[1].dtype == dtype
    assert ours[2].dtype == ours[3].dtype == torch.float32


def test_the_mask_is_the_same_in_the_backward() -> None:
    """With A the identity and W nothing, y and dx show the mask."""
    size, rows = 96, 40
    quantized = quantize_4bit(torch.zeros(size, size))
    lora_A, lora_B = torch.eye(size, requires_grad=True), torch.eye(size, requires_grad=True)
    x = torch.ones(rows, size, requires_grad=True)
    y = lora_linear(x, quantized, lora_A, lora_B, 1.0, 0.5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dx, y)
    assert 0.45 < y.bool().double().mean() < 0.55


def test_masks_differ_by_call_and_repeat_by_seed() -> None:
    quantized, lora_A, lora_B = layer(32, 64, 8)
    x = torch.randn(6, 64).bfloat16()
    torch.manual_seed(3)
    first, second = (lora_linear(x, quantized, lora_A, lora_B, SCALING, 0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(lora_linear(x, quantized, lora_A, lora_B, SCALING, 0.5), first)
    assert not torch.equal(first, second)


def test_without_dropout_no_random_number_is_drawn() -> None:
    quantized, lora_A, lora_B = layer(32, 64, 8)
    state = torch.get_rng_state()
    lora_linear(torch.randn(6, 64, generator=torch.Generator()), quantized, lora_A, lora_B, SCALING, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_under_gradient_checkpointing_the_gradients_are_the_same() -> None:
    quantized, lora_A, lora_B = layer(48, 64, 8)
    x = torch.randn(9, 64).bfloat16().requires_grad_()

    def run(checkpointed: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        arguments = x, quantized, lora_A, lora_B, SCALING, 0.3
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(lora_linear, *arguments, use_reentrant=False)
        else:
            y = lora_linear(*arguments)
        return torch.autograd.grad(y.float().square().sum(), (x, lora_A, lora_B))

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_show(threads: int) -> None:
    quantized, lora_A, lora_B = layer(200, 576, 16)
    x = torch.randn(300, 576).bfloat16().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        y = lora_linear(x, quantized, lora_A, lora_B, SCALING, 0.1)
        return gradients(y, torch.ones_like(y), x, lora_A, lora_B)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_only_x_and_t_are_kept() -> None:
    quantized, lora_A, lora_B = layer(128, 96, 4)
    x = torch.randn(50, 96).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, quantized, lora_A, lora_B, SCALING, 0.1)
    kept = [t for t in saved if t is not lora_A and t is not lora_B]
    assert sorted(t.shape for t in kept) == [(50, 4), (50, 96)]
    assert {t.data_ptr() for t in kept} >= {x.data_ptr()}


def test_no_input_gradient_is_computed_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, lora_A, lora_B = layer(32, 64, 8)
    y = lora_linear(torch.randn(6, 64), quantized, lora_A, lora_B, SCALING, 0.0)
    monkeypatch.setattr(QuantizedTensor, "matmul", None)
    y.sum().backward()
    assert lora_A.grad is not None
    assert lora_B.grad is not None
    frozen = lora_A.detach(), lora_B.detach()
    monkeypatch.undo()
    x = torch.randn(6, 64, requires_grad=True)
    calls: list[str] = []
    right = ops.matmul_dense
    monkeypatch.setattr(module.ops, "matmul_dense", lambda *a, **k: calls.append("") or right(*a, **k))
    lora_linear(x, quantized, *frozen, SCALING, 0.0).sum().backward()
    assert x.grad is not None
    assert len(calls) == 2  # t and dt


def test_no_rows() -> None:
    quantized, lora_A, lora_B = layer(32, 64, 8)
    y = lora_linear(torch.ones(0, 64, requires_grad=True), quantized, lora_A, lora_B, SCALING, 0.1)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert lora_A.grad is not None
    assert not lora_A.grad.any()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_that_share_an_input(dtype: torch.dtype, dropout: float) -> None:
    """As each alone, through one mask; dx is their sum."""
    layers = [layer(out, 96, rank) for out, rank in ((48, 16), (7, 3), (64, 8))]
    x = torch.randn(70, 96).to(dtype).requires_grad_()
    dys = [torch.randn(70, quantized.shape[0]).to(dtype) for quantized, _, _ in layers]
    weights, adapters = [entry[0] for entry in layers], [entry[1:] for entry in layers]
    factors = [factor for adapter in adapters for factor in adapter]
    torch.manual_seed(11)
    ys = lora_linears(x, weights, adapters, SCALING, dropout)
    dx, *gradients_of_factors = torch.autograd.grad(ys, [x, *factors], dys)

    expected_dx = torch.zeros(70, 96)
    for i, (quantized, lora_A, lora_B) in enumerate(layers):
        torch.manual_seed(11)
        alone = gradients(lora_linear(x, quantized, lora_A, lora_B, SCALING, dropout), dys[i], x, lora_A, lora_B)
        assert torch.equal(ys[i], alone[0])
        expected_dx += alone[1].float()
        for mine, other in zip(gradients_of_factors[2 * i : 2 * i + 2], alone[2:], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(dx.float(), expected_dx, rtol=tolerance, atol=tolerance * float(expected_dx.abs().max()))
