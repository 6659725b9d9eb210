"""The gate goes red on what is wrong and stays green on what merely rounds."""

import numpy as np
import pytest

from benchmarks.agreement import compare_bfloat16, compare_curves, compare_float32, judge, no_worse


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


def red(*fast: dict[str, np.ndarray]) -> list[str]:
    checks = compare_bfloat16("m", list(fast), [REFERENCE] * len(fast), [TRUTH] * len(fast))
    return [check.name.removeprefix("m: ") for check in checks if not check.passed]


def broken(key: str, value: float, seed: int = 2) -> dict[str, np.ndarray]:
    wrong = step(0.02, seed)
    wrong[key] = wrong[key] * value
    return wrong


def test_equal_to_the_reference_is_green():
    assert red(REFERENCE) == []


def test_other_roundings_of_the_same_size_are_green():
    assert red(step(0.02, seed=2), step(0.02, seed=3)) == []


def test_twice_the_error_is_red():
    assert {"gradients", "loss of each token"} <= set(red(step(0.05, seed=2), step(0.05, seed=3)))


def test_one_wrong_adapter_among_many_is_red():
    assert "gradient of each adapter" in red(*(broken("grad.layer2.lora_A", 1.1, seed) for seed in (2, 3)))


def test_what_is_off_on_one_part_of_the_text_alone_is_chance():
    assert red(broken("grad.layer2.lora_A", 1.1), step(0.02, seed=3)) == []


def test_a_wrong_mean_loss_is_red_on_any_part():
    wrong = {**step(0.02, seed=2), "loss": np.array([4.1], np.float32)}
    assert red(REFERENCE, wrong) == ["loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_red(value):
    wrong = step(0.02, seed=2)
    for key in ("grad.layer1.lora_B", "token_losses", "loss"):
        wrong[key][0] = value
    assert len(red(wrong)) == 4


def test_float32_has_to_agree():
    assert all(check.passed for check in compare_float32("m", [step(1e-5)], [TRUTH]))
    for key in ("grad.layer3.lora_B", "token_losses"):
        wrong = step(1e-5)
        wrong[key] = wrong[key] * 1.01
        assert [check.passed for check in compare_float32("m", [TRUTH, wrong], [TRUTH, TRUTH])].count(False) == 1


def test_an_exact_reference_does_not_make_an_error_of_nothing_red():
    values = np.ones(100, np.float32)
    assert no_worse("", values * 1.0001, values, values).passed
    assert not no_worse("", values * 1.01, values, values).passed


def test_no_gradients_at_all_are_red():
    bare = {name: REFERENCE[name] for name in ("token_losses", "loss")}
    with pytest.raises(ValueError, match="no adapter"):
        compare_bfloat16("m", [bare], [bare], [bare])


def test_greedy_text_may_differ_only_where_logits_are_as_good_as_equal():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((32, 500)).astype(np.float32) * 3
    reference = truth + 0.05 * rng.standard_normal(truth.shape).astype(np.float32)
    assert judge(truth.argmax(1), reference, truth).passed
    assert judge(reference.argmax(1), reference, truth).passed
    one_wrong = truth.argmax(1)
    one_wrong[5] = truth[5].argmin()
    assert not judge(one_wrong, reference, truth).passed


def curve(shift: float) -> np.ndarray:
    return np.linspace(4, 2, 50, dtype=np.float32) + np.float32(shift)


def test_a_curve_within_the_noise_of_seeds_is_green_and_one_outside_is_red():
    reference = [curve(0.0), curve(0.1), curve(-0.15)]
    assert compare_curves(curve(0.05), reference).passed
    assert not compare_curves(curve(0.2), reference).passed
    assert not compare_curves(np.full(50, np.nan, np.float32), reference).passed
