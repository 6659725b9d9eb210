"""A layer's experts in 4 bits against a plain loop over dense experts, adapters and gradients included."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.nn import Experts4bit
from halfbyte.quant import quantize_4bit

EXPERTS, CHOSEN, TOKENS, RANK = 5, 2, 13, 3


def activate(_: nn.Module, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def build(
    hidden: int, between: int, is_transposed: bool, dtype: torch.dtype = torch.float32, **storage: bool
) -> Experts4bit:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (EXPERTS, 2 * between, hidden), "down_proj": (EXPERTS, hidden, between)}
    if is_transposed:
        shapes = {name: (count, columns, rows) for name, (count, rows, columns) in shapes.items()}
    module = Experts4bit(shapes, activate, is_transposed=is_transposed, compute_dtype=dtype)
    for name, shape in shapes.items():
        module.set_quantized(name, quantize_4bit(0.3 * torch.randn(shape, generator=generator), **storage))
        out = shape[2 if is_transposed else 1]
        module.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, out, generator=generator)))
    return module


def dense(module: Experts4bit, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Token by token, with B·A added to the dequantized weight."""
    matrices = {}
    for name, quantized in module.all_quantized.items():
        weight = quantized.dequantize(torch.float32)
        weight = weight.transpose(1, 2) if module.is_transposed else weight
        if name in module.low_rank:
            lora_A, lora_B = module.low_rank[name]
            weight = weight + lora_B @ lora_A
        matrices[name] = weight
    rows = []
    for token in range(len(x)):
        row = torch.zeros_like(x[0])
        for place, expert in enumerate(index[token].tolist()):
            y = F.linear(x[token], matrices["gate_up_proj"][expert], module.gate_up_proj_bias[expert])
            y = F.linear(activate(module, y), matrices["down_proj"][expert], module.down_proj_bias[expert])
            row = row + y * weights[token, place]
        rows.append(row)
    return torch.stack(rows)


def inputs(hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last expert is nobody's choice."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    return x, index, torch.rand(TOKENS, CHOSEN, generator=generator)


# An expert of 256 x 256 values is whole blocks of values and of absmax, one of 64 x 48 of values alone, one of 25 x 9
# of neither, and begins within a byte.
SIZES = [(256, 128), (64, 24), (25, 9)]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("hidden", "between"), SIZES)
def test_outputs_and_gradients_are_those_of_dense_experts(
    hidden: int, between: int, double_quant: bool, is_transposed: bool, adapted: bool
) -> None:
    module = build(hidden, between, is_transposed, double_quant=double_quant)
    x, index, weights = inputs(hidden)
    leaves = [x.requires_grad_(), weights.requires_grad_()]
    if adapted:
        for name, (out, columns) in {"gate_up_proj": (2 * between, hidden), "down_proj": (hidden, between)}.items():
            lora_A = (0.1 * torch.randn(EXPERTS, RANK, columns)).requires_grad_()
            lora_B = torch.randn(out, RANK, EXPERTS).permute(2, 0, 1).requires_grad_()  # as PEFT keeps it
            module.low_rank[name] = lora_A, lora_B
            leaves += [lora_A, lora_B]
    ours, theirs = module(x, index, weights), dense(module, x, index, weights)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    direction = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    ):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_bfloat16_is_as_near_as_bfloat16_is() -> None:
    module = build(256, 128, False, torch.bfloat16)
    x, index, weights = inputs(256)
    exact = dense(module, x, index, weights)
    ours = module(x.bfloat16(), index, weights.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 0.02 * exact.norm()


def test_no_token_and_one_expert_for_all() -> None:
    module = build(64, 24, False)
    x, index, weights = inputs(64)
    assert module(x[:0], index[:0], weights[:0]).shape == (0, 64)
    index = torch.zeros_like(index)
    torch.testing.assert_close(module(x, index, weights), dense(module, x, index, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_its_state_is_bitsandbytes_keys_and_comes_back(double_quant: bool) -> None:
    module = build(64, 24, False, double_quant=double_quant)
    state = module.state_dict()
    suffixes = {"", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"}
    suffixes |= {".nested_absmax", ".nested_quant_map"} if double_quant else set()
    names = {name + suffix for name in ("gate_up_proj", "down_proj") for suffix in suffixes}
    assert state.keys() == names | {"gate_up_proj_bias", "down_proj_bias"}
    other = build(64, 24, False)
    other.load_state_dict(state)
    for again in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(again.state_dict()[key], state[key]) for key in state)
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj_bias"):
        other.load_state_dict({key: tensor for key, tensor in state.items() if key != "down_proj_bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        other.load_state_dict(state | {"other": torch.zeros(1)})
    assert all(t.dtype in (torch.uint8, torch.float32) for t in module.bfloat16().packed_constants)


def test_a_part_shares_the_memory_of_the_whole() -> None:
    whole = quantize_4bit(torch.randn(4, 64, 256))
    for index in range(4):
        part = whole.part(index)
        assert part.packed.untyped_storage().data_ptr() == whole.packed.untyped_storage().data_ptr()
        assert torch.equal(part.dequantize(torch.float32), whole.dequantize(torch.float32)[index])
