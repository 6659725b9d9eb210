"""Linear4bit is the dense layer of its dequantized weight, and never anything else."""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import HalfbyteError, Linear4bit

SIZES = [(1, 1), (1, 64), (64, 1), (7, 13), (33, 129), (65, 64), (192, 576)]  # (out, in)
ROWS: list[tuple[int, ...]] = [(), (1,), (5,), (2, 3), (0,), (2, 0)]


def build(out_features: int, in_features: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> Linear4bit:
    dense = nn.Linear(in_features, out_features, bias=bias)
    return Linear4bit.from_linear(dense, compute_dtype=dtype)


@dataclass
class Dense:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(self.weight.dtype))


def through(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


# ── Forward and backward ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_further_from_float32_than_the_dense_layer_in_the_same_dtype(
    size: tuple[int, int], dtype: torch.dtype, bias: bool
) -> None:
    layer = build(*size, bias, dtype)
    weight, offset = layer.quantized.dequantize(dtype), layer.bias
    for rows in ROWS:
        x = torch.randn(*rows, size[1]).to(dtype)
        dy = torch.randn(*rows, size[0]).to(dtype)
        ours = through(layer, x, dy)
        dense = through(Dense(weight, offset), x, dy)
        # What both approximate: the same rounded inputs and weight, in float64.
        exact = through(Dense(weight.double(), offset), x.double(), dy.double())
        terms = Dense(weight.abs(), None if offset is None else offset.abs())
        totals = through(terms, x.abs(), dy.abs())
        for got, reference, truth, total in zip(ours, dense, exact, totals, strict=True):
            assert got.dtype == dtype
            assert got.shape == truth.shape
            if truth.numel():
                # Slack: one rounding of the largest value; in float32, of the sum of its terms in any order.
                unit = torch.finfo(dtype).eps * (total if dtype == torch.float32 else truth.abs()).max()
                worst = (reference.double() - truth).abs().max()
                assert (got.double() - truth).abs().max() <= worst + unit


def test_the_output_has_the_dtype_of_the_input_and_the_products_have_compute_dtype() -> None:
    layer = build(32, 96, bias=True, dtype=torch.bfloat16)
    x = torch.randn(4, 96)
    rounded = layer(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), rounded.float())
    assert layer(x.half()).dtype == torch.float16


def test_the_input_gradient_is_that_of_the_dequantized_weight() -> None:
    layer = build(11, 9)
    x = torch.randn(3, 9, dtype=torch.float32, requires_grad=True)
    assert torch.allclose(torch.autograd.functional.jacobian(layer, x[0]), layer.quantized.dequantize(), atol=1e-6)


def test_a_gradient_can_be_differentiated_again() -> None:
    layer = build(8, 6)
    x = torch.randn(2, 6, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    weight = layer.quantized.dequantize()
    assert torch.allclose(second, (2 * weight.T @ weight).sum(0).expand(2, 6), atol=1e-5)


def test_there_is_never_a_gradient_for_the_weight_or_the_bias() -> None:
    layer = build(16, 24, bias=True)
    layer(torch.randn(3, 24, requires_grad=True)).sum().backward()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert not layer(torch.randn(3, 24)).requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_no_activation_is_kept_for_the_backward(bias: bool) -> None:
    layer = build(48, 32, bias, torch.bfloat16)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(4, 32, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            activation = x + 0
            y = layer(activation)
        alive = weakref.ref(activation)
        del activation
        gc.collect()
        assert saved == []  # nothing by save_for_backward,
        assert alive() is None  # and no reference beside it
        y.sum().backward()
        assert x.grad is not None


def test_forward_and_backward_in_either_mode_leave_the_weight_and_the_result_as_they_were() -> None:
    layer = build(40, 72, bias=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x, dy = torch.randn(5, 72), torch.randn(5, 40)
    layer.train()
    first = through(layer, x, dy)
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
    with torch.inference_mode():
        inferred = layer(x)
    in_eval = through(layer, x, dy)
    layer.train()
    again = through(layer, x, dy)
    assert torch.equal(evaluated, first[0])
    assert torch.equal(inferred, first[0])
    for got in (in_eval, again):
        assert torch.equal(got[0], first[0])
        assert torch.equal(got[1], first[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


# ── What Module can do to it ────────────────────────────────────────────────────────────────────────────────


def same_bits(one: Linear4bit, other: Linear4bit) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("cast", ["to bfloat16", "half", "double", "to cpu", "float", "share_memory"])
def test_a_cast_moves_the_bias_and_never_the_codes_or_constants(cast: str, double_quant: bool) -> None:
    layer = Linear4bit.from_linear(nn.Linear(96, 64, bias=False), double_quant=double_quant)
    before = copy.deepcopy(layer)
    x = torch.randn(3, 96)
    casts = {
        "to bfloat16": lambda m: m.to(torch.bfloat16),
        "half": lambda m: m.half(),
        "double": lambda m: m.double(),
        "to cpu": lambda m: m.to("cpu", torch.float16),
        "float": lambda m: m.float(),
        "share_memory": lambda m: m.share_memory(),
    }
    parent = nn.Sequential(layer)
    casts[cast](parent)
    assert layer.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
    assert same_bits(layer, before)
    assert torch.equal(layer(x), before(x))


def test_half_casts_the_bias() -> None:
    layer = build(8, 8, bias=True)
    assert layer.half().bias.dtype == torch.float16


def test_a_deep_copy_is_equal_and_its_own() -> None:
    layer = build(24, 40, bias=True)
    other = copy.deepcopy(layer)
    assert same_bits(layer, other)
    other.weight.data.zero_()
    other.absmax.zero_()
    assert layer.weight.any()
    assert layer.absmax.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_a_state_dict_restores_every_bit(quant_type: str, double_quant: bool, bias: bool) -> None:
    layer = Linear4bit.from_linear(nn.Linear(72, 56, bias=bias), quant_type, 32, double_quant, torch.float32)
    state = nn.Sequential(layer).state_dict()
    assert "0.weight.quant_map" in state
    assert not any(key.startswith(("0.absmax", "0.nested")) for key in state)
    # Into a layer that was made with other settings: those of the file count.
    other = nn.Sequential(Linear4bit(72, 56, bias, quant_type="nf4", block_size=64, compute_dtype=torch.float32))
    result = other.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    x = torch.randn(2, 72)
    assert same_bits(layer, other[0])
    assert torch.equal(layer(x), other[0](x))
    assert (other[0].quant_type, other[0].block_size, other[0].double_quant) == (quant_type, 32, double_quant)


def test_keys_that_are_missing_or_too_many_are_reported() -> None:
    layer = nn.Sequential(build(16, 32, bias=True))
    state = layer.state_dict()
    empty = layer.load_state_dict({}, strict=False)
    assert empty.missing_keys == ["0.weight", "0.bias"]
    without_bias = nn.Sequential(build(16, 32)).load_state_dict(state, strict=False)
    assert without_bias.unexpected_keys == ["0.bias"]
    with pytest.raises(RuntimeError, match=r"0\.bias"):
        nn.Sequential(build(16, 32)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        layer.load_state_dict({"0.bias": state["0.bias"]})
    del state["0.weight.absmax"]
    with pytest.raises(HalfbyteError, match=r"0\.weight\.absmax"):
        layer.load_state_dict(state)


def test_the_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="16, 32"):
        build(32, 16).load_state_dict(build(16, 32).state_dict())


def test_a_layer_without_a_weight_says_so() -> None:
    with pytest.raises(RuntimeError, match="holds no weight yet"):
        Linear4bit(8, 8)(torch.randn(1, 8))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight[2, 3] = torch.nan
    with pytest.raises(HalfbyteError, match="128 to 191"):
        Linear4bit.from_linear(linear)


def test_it_is_a_linear_layer_and_shows_what_it_is() -> None:
    layer = build(24, 40)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (40, 24)
    for word in ("in_features=40", "nf4", "block_size=64", "double_quant"):
        assert word in repr(layer)
