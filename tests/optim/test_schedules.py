"""Learning-rate schedules, as numbers that can be worked out by hand."""

import math

import pytest

from halfbyte.optim import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2]),
        ("linear", 4, [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
        ("cosine", 0, [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 1 / 2]),
    ],
)
def test_the_factors_of_four_steps(schedule: str, warmup_steps: int, expected: list[float]) -> None:
    assert [learning_rate_factor(schedule, step, 4, warmup_steps) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2, 10, 997])
@pytest.mark.parametrize("warmup_ratio", [0, 0.03, 1])
def test_no_step_is_without_learning_and_none_is_above_the_peak(
    schedule: str, total_steps: int, warmup_ratio: float
) -> None:
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    factors = [learning_rate_factor(schedule, step, total_steps, warmup_steps) for step in range(total_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
