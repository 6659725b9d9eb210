"""A step: the same whatever the split into micro-batches, and nothing updated when something is wrong."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from halfbyte import HalfbyteError
from halfbyte.data import Example, collate
from halfbyte.nn import count_supervised
from halfbyte.recipes import training
from halfbyte.recipes.training import evaluate_loss, evaluation_batches, train_step
from models import VOCABULARY_SIZE, build_model

CPU = torch.device("cpu")
PAD = VOCABULARY_SIZE - 1


def examples() -> list[Example]:
    """Eight rows of 3 to 100 tokens, of which 1 to 60 are supervised: a mean over rows would be far off."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length, supervised in ((3, 1), (100, 60), (7, 6), (20, 2), (64, 1), (5, 3), (33, 32), (12, 4)):
        input_ids = torch.randint(VOCABULARY_SIZE - 3, (length,), generator=generator, dtype=torch.int32)
        labels = input_ids.clone()
        labels[: length - supervised] = -100
        rows.append(Example(input_ids, labels))
    return rows


@pytest.fixture
def model() -> nn.Module:
    return build_model(dtype=torch.float32)


def step(
    model: nn.Module, rows_per_batch: int, order: list[int], max_grad_norm: float = 0
) -> tuple[dict[str, float], list[Tensor]]:
    """The figures of one step, and the gradient: with plain descent and a rate of 1, what was taken away."""
    model = copy.deepcopy(model)
    rows = [examples()[index] for index in order]
    batches = [collate(rows[i : i + rows_per_batch], PAD) for i in range(0, len(rows), rows_per_batch)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    values = train_step(model, optimizer, batches, 1.0, max_grad_norm, CPU)
    return values, [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("rows_per_batch", [8, 4, 2, 1, 3])
@pytest.mark.parametrize("order", [list(range(8)), [5, 1, 7, 0, 2, 6, 3, 4]])
def test_loss_and_gradient_do_not_depend_on_the_split(model: nn.Module, rows_per_batch: int, order: list[int]) -> None:
    expected, expected_gradient = step(model, 8, list(range(8)))
    values, gradient = step(model, rows_per_batch, order)
    assert values["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert values["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert values["supervised_tokens"] == 109
    assert values["tokens"] == 244
    for mine, other in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_tokens_and_not_over_rows(model: nn.Module) -> None:
    values, _ = step(model, 2, list(range(8)))
    alone = [step(model, 1, [index])[0] for index in range(8)]
    over_tokens = sum(row["loss"] * row["supervised_tokens"] for row in alone) / 109
    over_rows = sum(row["loss"] for row in alone) / 8
    assert values["loss"] == pytest.approx(over_tokens, rel=1e-5)
    assert abs(over_tokens - over_rows) > 0.05


def test_a_gradient_is_scaled_down_to_the_limit_and_zero_means_none(model: nn.Module) -> None:
    values, gradient = step(model, 8, list(range(8)))
    norm = torch.stack([part.norm() for part in gradient]).norm().item()
    assert norm == pytest.approx(values["grad_norm"], rel=1e-3)
    limited, small = step(model, 8, list(range(8)), max_grad_norm=norm / 10)
    assert limited["grad_norm"] == pytest.approx(norm, rel=1e-3)  # what is told is the norm before
    assert torch.stack([part.norm() for part in small]).norm().item() == pytest.approx(norm / 10, rel=1e-3)
    above, large = step(model, 8, list(range(8)), max_grad_norm=norm * 10)
    torch.testing.assert_close(large, gradient)
    assert above["grad_norm"] == values["grad_norm"]


def test_the_learning_rate_is_that_of_the_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    values = train_step(model, optimizer, [collate(examples(), PAD)], 0.25, 1.0, CPU)
    assert optimizer.param_groups[0]["lr"] == values["learning_rate"] == 0.25


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(
    model: nn.Module, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.deepcopy(model.state_dict())
    original = training.supervised_loss
    monkeypatch.setattr(training, "supervised_loss", lambda *arguments: original(*arguments) * value)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(HalfbyteError, match="not finite"):
        train_step(model, optimizer, [collate(examples(), PAD)], 1.0, 0.3, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_step_trains_whatever_mode_the_model_was_in(model: nn.Module) -> None:
    model.eval()
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), [collate(examples(), PAD)], 0.0, 0, CPU)
    assert model.training


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_the_loss_on_held_out_rows_does_not_depend_on_the_batches(model: nn.Module, size: int) -> None:
    expected = step(model, 8, list(range(8)))[0]["loss"]
    batches = list(evaluation_batches(examples(), size, PAD))
    assert sum(map(count_supervised, batches)) == 109
    random_state = torch.get_rng_state()
    loss, supervised = evaluate_loss(model, batches, CPU)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert supervised == 109
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_like_length_are_evaluated_together() -> None:
    batches = list(evaluation_batches(examples(), 2, PAD))
    assert [batch["input_ids"].shape[1] for batch in batches] == [5, 12, 33, 100]
