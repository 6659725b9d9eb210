"""AdamW against torch's."""

import pytest
import torch
from torch import nn

from halfbyte.optim import AdamW

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
