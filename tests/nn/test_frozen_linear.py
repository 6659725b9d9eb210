"""The frozen product beside the weight that was quantized, and the layer compiled, pickled and on disk."""

import io
import math
import pickle

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from halfbyte import Linear4bit, quantize_4bit
from halfbyte.nn import frozen_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("out_features", "in_features"), [(512, 128), (128, 512), (256, 256), (768, 256)])
def test_one_token_is_as_near_to_the_dense_product_as_the_dequantized_weight_is(
    out_features: int, in_features: int, quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    fused, dequantized = [], []
    for _ in range(10):
        x = torch.randn(1, in_features).to(dtype)
        weight = (torch.randn(out_features, in_features) / math.sqrt(in_features)).to(dtype)
        quantized = quantize_4bit(weight, quant_type, double_quant=double_quant)
        dense = x @ weight.t()
        fused.append((frozen_linear(x, quantized) - dense).float().abs().mean())
        dequantized.append((x @ quantized.dequantize().t() - dense).float().abs().mean())
    ratio = (sum(fused) / sum(dequantized)).item()
    assert 0.995 < ratio < 1.005


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [1, 63, 64, 576, 2048])
def test_the_identity_gives_back_its_input(size: int, quant_type: str, dtype: torch.dtype) -> None:
    x = (0.1 * torch.randn(1, 1, size)).to(dtype).requires_grad_()
    identity = quantize_4bit(torch.eye(size), quant_type, double_quant=False)
    y = frozen_linear(x, identity)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x)
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_output_and_gradient_are_near_those_of_the_weight_itself(
    quant_type: str, transpose: bool, dtype: torch.dtype
) -> None:
    weight = nn.init.xavier_uniform_(torch.empty(96, 64)).to(dtype)
    x = torch.randn(64, 96 if transpose else 64).to(dtype).requires_grad_()
    target = torch.randn(64, 64 if transpose else 96).to(dtype)
    dense = x @ (weight if transpose else weight.t())
    frozen = frozen_linear(x, quantize_4bit(weight, quant_type), transpose)
    assert (frozen - dense).abs().mean() < 0.115
    # Of the same loss, so that only the gradient differs.
    dy = (dense - target).detach() * 2 / target.numel()
    (expected,) = torch.autograd.grad(dense, x, dy)
    (got,) = torch.autograd.grad(frozen, x, dy)
    torch.testing.assert_close(got, expected, atol=0.015, rtol=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_lies_before_a_frozen_layer_learns_as_before_the_dense_one(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    dense = nn.Sequential(nn.Linear(36, 84), nn.Linear(84, 128)).to(dtype)
    nn.init.kaiming_normal_(dense[0].weight)
    nn.init.kaiming_normal_(dense[1].weight)
    frozen = nn.Sequential(
        dense[0], Linear4bit.from_linear(dense[1], quant_type, double_quant=double_quant, compute_dtype=dtype)
    )
    for _ in range(20):
        x = torch.randn(16, 36).to(dtype)
        expected = torch.autograd.grad(dense(x).mean(), list(dense[0].parameters()))
        got = torch.autograd.grad(frozen(x).mean(), list(dense[0].parameters()))
        torch.testing.assert_close(got[0], expected[0], atol=0.015, rtol=0.05)
        torch.testing.assert_close(got[1], expected[1], atol=0.02, rtol=0.05)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, of its own code
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_compile_as_one_graph_forward_and_backward(dtype: torch.dtype, double_quant: bool, bias: bool) -> None:
    torch.compiler.reset()
    dense = [nn.Linear(64, 64, bias=bias) for _ in range(3)]
    network = nn.Sequential(
        *(Linear4bit.from_linear(layer, double_quant=double_quant, compute_dtype=dtype) for layer in dense)
    )
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x), network(x))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(network(x).sum(), x)
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_a_layer_is_pickled_to_the_bit(quant_type: str, double_quant: bool) -> None:
    layer = Linear4bit.from_linear(nn.Linear(300, 40), quant_type, 32, double_quant, torch.float32)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(4, 300)
    for other in (pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        theirs = other.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in layer.state_dict().items())
        assert not any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_on_disk_it_takes_less_than_29_hundredths_of_16_bits(bias: bool) -> None:
    def bytes_on_disk(module: nn.Module) -> int:
        state: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        return len(save(state))

    dense = nn.Linear(300, 400, bias=bias, dtype=torch.bfloat16)
    assert bytes_on_disk(Linear4bit.from_linear(dense)) < 0.29 * bytes_on_disk(dense)
