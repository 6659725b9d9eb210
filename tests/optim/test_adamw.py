"""AdamW against torch's; its state in 8 bits and in pages."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte import ops
from halfbyte.errors import HalfbyteError
from halfbyte.formats import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, OPTIMIZER_BLOCK_SIZE
from halfbyte.optim import AdamW
from halfbyte.optim.unified import unified_state

SETTINGS = [
    {"lr": 1e-2},
    {"lr": 1e-3, "weight_decay": 0.1},
    {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.5},
    {"lr": 1e-2, "betas": (0.0, 0.0)},
]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (1, 64), ())]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equal_to_torch(settings: dict[str, float]) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = AdamW(ours, **settings), torch.optim.AdamW(theirs, **({"weight_decay": 0.0} | settings))
    for step in range(50):
        for mine, other in zip(ours, theirs, strict=True):
            # Gradients of very different sizes, some of them zero.
            mine.grad = torch.randn_like(mine) * 10.0 ** (step % 7 - 4) * (step % 5 > 0)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = settings["lr"] * (1 - step / 50)
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_the_moments_are_float32_and_a_parameter_without_gradient_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([first, second], lr=0.1, weight_decay=0.1)
    first.grad = torch.ones(4, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(second, torch.ones(4))
    assert second not in optimizer.state
    assert optimizer.state[first]["exp_avg"].dtype == torch.float32
    assert optimizer.state[first]["exp_avg_sq"].dtype == torch.float32
    assert (first < 1).all()


def test_groups_have_their_own_settings_and_a_closure_is_called() -> None:
    fast, slow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [fast], "lr": 0.5}, {"params": [slow]}], lr=0.25)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (fast + slow).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    torch.testing.assert_close(fast.detach(), torch.full((2,), 0.5))
    torch.testing.assert_close(slow.detach(), torch.full((2,), 0.75))


# ── 8 bits, and pages ───────────────────────────────────────────────────────────────────────────────────────

SHAPES = ((7, 5), (64, 100), (3,), (129, 33), (4096,), ())  # of 35, 6,400, 3, 4,257, 4,096 and 1 values
WAYS = [{"state_bits": bits, "paged": paged} for bits in (32, 8) for paged in (False, True)]
Make = Callable[..., tuple[list[nn.Parameter], AdamW]]

pytestmark = pytest.mark.filterwarnings("ignore:page_dir")  # where tests write may be memory


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """New parameters, the same each time, and an optimizer of them in two groups."""

    def new(paged: bool = False, **settings: Any) -> tuple[list[nn.Parameter], AdamW]:
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        groups = [{"params": parameters[:4], "lr": 1e-2, "weight_decay": 0.1}, {"params": parameters[4:]}]
        return parameters, AdamW(groups, lr=1e-3, paged=paged, page_dir=tmp_path if paged else None, **settings)

    return new


def train(parameters: list[nn.Parameter], optimizer: AdamW, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + index)
            if (step + index) % 5:  # one of them has no gradient
                parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 7 - 4)
        optimizer.step()


def assert_the_same(mine: tuple[list[nn.Parameter], AdamW], other: tuple[list[nn.Parameter], AdamW]) -> None:
    for a, b in zip(mine[0], other[0], strict=True):
        assert torch.equal(a, b)
        ours, theirs = mine[1].state[a], other[1].state[b]
        assert ours.keys() == theirs.keys()
        assert ours["step"] == theirs["step"]
        for name in ours.keys() - {"step"}:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("bits", [32, 8])
def test_pages_do_not_change_a_bit(make: Make, bits: int) -> None:
    in_memory, in_pages = make(state_bits=bits), make(state_bits=bits, paged=True)
    for start in range(0, 60, 10):
        train(*in_memory, range(start, start + 10))
        train(*in_pages, range(start, start + 10))
        in_pages[1].evict()
        assert_the_same(in_pages, in_memory)


@pytest.mark.parametrize("before", WAYS, ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_a_saved_state_goes_on_to_the_same_bits(make: Make, before: dict[str, Any], paged: bool) -> None:
    """From pages to memory and the other way too, and with settings of groups that have changed since."""
    undisturbed, first = make(**before), make(**before)
    train(*undisturbed, range(6))
    undisturbed[1].param_groups[1]["lr"] = 5e-3
    train(*undisturbed, range(6, 12))
    train(*first, range(6))
    first[1].param_groups[1]["lr"] = 5e-3
    saved = first[1].state_dict()
    second = make(state_bits=before["state_bits"], paged=paged)
    train(*second, range(3))  # a state to be forgotten
    with torch.no_grad():
        for mine, other in zip(second[0], first[0], strict=True):
            mine.copy_(other)
    second[1].load_state_dict(saved)
    train(*first, range(20, 22))  # what was saved is a copy by now
    train(*second, range(6, 12))
    assert_the_same(second, undisturbed)


def test_what_8_bits_are(make: Make) -> None:
    parameters, optimizer = make(state_bits=8)
    train(parameters, optimizer, range(3))
    for parameter in parameters:
        state = {name: tensor for name, tensor in optimizer.state[parameter].items() if name != "step"}
        n = parameter.numel()
        if n < 4096:
            assert {name: t.dtype for name, t in state.items()} == dict.fromkeys(
                ("exp_avg", "exp_avg_sq"), torch.float32
            )
            continue
        assert [*state] == ["exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"]
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.uint8}
        assert state["exp_avg"].shape == parameter.shape
        assert len(state["exp_avg_absmax"]) == -(-n // 256)
        assert sum(tensor.nbytes for tensor in state.values()) < 2.1 * n


def test_moments_of_a_16_bit_parameter_survive_saving() -> None:
    """torch would give them the parameter's dtype."""
    for bits in (32, 8):
        pair = [nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)]
        first, second = AdamW(pair[:1], state_bits=bits), AdamW(pair[1:], state_bits=bits)
        pair[0].grad = torch.randn(5000).bfloat16()
        first.step()
        second.load_state_dict(first.state_dict())
        for name, tensor in first.state[pair[0]].items():
            assert name == "step" or torch.equal(tensor, second.state[pair[1]][name])


def test_a_state_of_other_bits_or_parameters_is_refused_and_nothing_is_set(make: Make) -> None:
    (parameters, saved_by), (others, optimizer) = make(state_bits=32), make(state_bits=8, paged=True)
    train(parameters, saved_by, range(2))
    train(others, optimizer, range(2))
    copy = make(state_bits=8)
    train(*copy, range(2))
    with pytest.raises(HalfbyteError, match=r"of shape \(64, 100\).*float32.*state_bits"):
        optimizer.load_state_dict(saved_by.state_dict())
    with pytest.raises(HalfbyteError, match=r"of shape \(7, 5\)"):
        optimizer.load_state_dict(
            AdamW([nn.Parameter(torch.ones(3))]).state_dict()
            | {
                "state": {0: {"step": 1, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}},
            }
        )
    assert_the_same((others, optimizer), copy)


def test_what_is_no_setting_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(HalfbyteError, match="state_bits is 16; it must be 32 or 8"):
        AdamW([parameter], state_bits=16)
    with pytest.raises(HalfbyteError, match="nothing is paged"):
        AdamW([parameter], page_dir="/tmp")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_copy_is_independent(make: Make, way: dict[str, Any]) -> None:
    first = make(**way)
    train(*first, range(3))
    second = copy.deepcopy(first)
    assert_the_same(first, second)
    train(*first, range(3, 6))
    train(*second, range(3, 6))
    assert_the_same(first, second)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_its_own_state_can_be_loaded(make: Make, way: dict[str, Any]) -> None:
    first, second = make(**way), make(**way)
    for training in (first, second):
        train(*training, range(3))
    first[1].load_state_dict(first[1].state_dict())
    assert_the_same(first, second)


def test_state_that_is_dropped_begins_at_zero(make: Make) -> None:
    used, new = make(paged=True), make()
    train(*used, range(3))
    used[1].state.clear()
    with torch.no_grad():
        for mine, other in zip(used[0], new[0], strict=True):
            mine.copy_(other)
    train(*used, range(3))
    train(*new, range(3))
    assert_the_same(used, new)


def test_a_gpu_without_bitsandbytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(HalfbyteError, match="needs bitsandbytes"):
        unified_state({"m": torch.empty(3, device="meta")}, torch.device("cuda:0"))


def test_8_bits_learn_as_32_do() -> None:
    """A small network on noisy samples of a function, the loss on held-out ones: 8 bits cost less than a seed does."""

    def held_out_loss(bits: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) / 4
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8))
        optimizer = AdamW(network.parameters(), lr=3e-3, state_bits=bits)
        for step in range(300):
            x = torch.randn(64, 16, generator=generator)
            y = torch.sin(x @ mixing) + 0.1 * torch.randn(64, 8, generator=generator)
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
            optimizer.zero_grad()
            nn.functional.mse_loss(network(x), y).backward()
            optimizer.step()
        x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(99))
        return nn.functional.mse_loss(network(x), torch.sin(x @ mixing)).item()

    wide, narrow = ([held_out_loss(bits, seed) for seed in range(4)] for bits in (32, 8))
    print(wide, narrow)
    assert max(wide) < 0.1  # of 0.43: it has learned
    assert abs(sum(narrow) - sum(wide)) / 4 <= max(wide) - min(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_step_from_8_bits_is_near_the_step_from_the_same_moments_in_32(dtype: torch.dtype) -> None:
    """Parameters and moments of both are made equal after each step, so that what is measured is one step."""
    start = (0.1 * torch.randn(1024, 257)).to(dtype)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.float())
    narrow = AdamW([ours], lr=1e-3, state_bits=8)
    wide = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    maps = {"exp_avg": torch.tensor(DYNAMIC_SIGNED), "exp_avg_sq": torch.tensor(DYNAMIC_UNSIGNED)}
    for _ in range(30):
        ours.grad = (0.01 * torch.randn(ours.shape)).to(dtype)
        theirs.grad = ours.grad.float()
        narrow.step()
        wide.step()
        error = (theirs - ours.float()).abs().detach()
        relative = error / (theirs.detach().abs() + 1e-9)
        assert error.mean() < (1.7e-4 if dtype == torch.bfloat16 else 6e-5)
        assert relative.mean() < (1.6e-3 if dtype == torch.bfloat16 else 6e-4)
        with torch.no_grad():
            theirs.copy_(ours)
        for name, codebook in maps.items():
            moments = narrow.state[ours]
            decoded = ops.dequantize_8bit(moments[name], moments[f"{name}_absmax"], codebook, OPTIMIZER_BLOCK_SIZE)
            exact = wide.state[theirs][name]
            assert (~torch.isclose(decoded, exact, atol=3e-3, rtol=1e-3)).sum() < 20
            exact.copy_(decoded)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float16, 1e-4, 1e-3), (torch.bfloat16, 1e-3, 1e-2)])
def test_16_bit_parameters_have_moments_as_torch_in_float32(dtype: torch.dtype, atol: float, rtol: float) -> None:
    ours = nn.Parameter((0.1 * torch.randn(1024, 33)).to(dtype))
    theirs = nn.Parameter(ours.detach().float())
    optimizers = AdamW([ours], lr=1e-3), torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        ours.grad = (0.01 * torch.randn(ours.shape)).to(dtype)
        theirs.grad = ours.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):
            exact = optimizers[1].state[theirs][name]
            torch.testing.assert_close(optimizers[0].state[ours][name], exact, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.float(), theirs, atol=atol, rtol=rtol)
        with torch.no_grad():
            theirs.copy_(ours)
