"""The gate goes red on what is wrong and stays green on what merely rounds."""

import numpy as np
import pytest

from benchmarks.correctness import compare_curves, compare_step, no_worse


def step(noise: float, seed: int = 0) -> dict[str, np.ndarray]:
    """A step whose every number is off by `noise`, relative, from the one with no noise."""
    truth, rng = np.random.default_rng(100), np.random.default_rng(seed)

    def values(size: int) -> np.ndarray:
        return (truth.standard_normal(size) * (1 + noise * rng.standard_normal(size))).astype(np.float32)

    names = [f"grad.layer{i}.lora_{f}" for i in range(4) for f in "AB"]
    return {"token_losses": values(4000) + 4, "loss": np.array([4.0 + noise * 0.1], np.float32)} | {
        name: values(2000) for name in names
    }


TRUTH, REFERENCE = step(0.0), step(0.02, seed=1)


def red(fast: dict[str, np.ndarray]) -> list[str]:
    return [check.name for check in compare_step("m", fast, REFERENCE, TRUTH) if not check.passed]


def test_equal_to_the_reference_is_green():
    assert red(REFERENCE) == []


def test_other_roundings_of_the_same_size_are_green():
    assert red(step(0.02, seed=2)) == []


def test_twice_the_error_is_red():
    assert {"m: gradients", "m: loss of each token"} <= set(red(step(0.05, seed=2)))


def test_one_wrong_adapter_among_many_is_red():
    wrong = step(0.02, seed=2)
    wrong["grad.layer2.lora_A"] = wrong["grad.layer2.lora_A"] * 1.1
    assert "m: gradient of each adapter" in red(wrong)


def test_a_wrong_mean_loss_is_red():
    assert red({**step(0.02, seed=2), "loss": np.array([4.1], np.float32)}) == ["m: loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_red(value):
    wrong = step(0.02, seed=2)
    wrong["grad.layer1.lora_B"][7] = value
    wrong["token_losses"][3] = value
    wrong["loss"][0] = value
    assert len(red(wrong)) == 4


def test_an_exact_reference_does_not_make_an_error_of_nothing_red():
    values = np.ones(100, np.float32)
    assert no_worse("", values * 1.0001, values, values).passed
    assert not no_worse("", values * 1.01, values, values).passed


def test_no_gradients_at_all_are_red():
    bare = {name: REFERENCE[name] for name in ("token_losses", "loss")}
    with pytest.raises(ValueError, match="no adapter"):
        compare_step("m", bare, bare, bare)


def curve(shift: float) -> np.ndarray:
    return np.linspace(4, 2, 50, dtype=np.float32) + np.float32(shift)


def test_a_curve_within_the_noise_of_seeds_is_green_and_one_outside_is_red():
    reference = [curve(0.0), curve(0.1), curve(-0.15)]
    assert compare_curves(curve(0.05), reference).passed
    assert not compare_curves(curve(0.2), reference).passed
    assert not compare_curves(np.full(50, np.nan, np.float32), reference).passed
