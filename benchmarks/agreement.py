"""Whether two sets of numbers agree, and how that is told apart from rounding: what the correctness gate decides by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]

# How much larger than the reference's an error may be: over millions of values, the same rounding in another order
# moves it by a few per cent; over the few thousand values of one adapter, by more.
SLACK, SLACK_OF_ONE_TENSOR = 1.25, 2.0
# In units of the noise of one logit: to prefer another token takes two of them to be off, among many candidates.
LARGEST_REGRET = 6.0
# Where the reference hits float32 almost exactly, an error this small is nothing.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def judge(written: NDArray[Any], reference: NDArray[np.float32], truth: NDArray[np.float32]) -> Check:
    """Greedy text may differ where two tokens are as good as equal: nowhere else, by the float32 reference's logits."""
    noise = _root_mean_square(reference - truth)
    regret = truth.max(axis=1) - truth[np.arange(len(written)), written]
    passed = bool(regret.mean() <= noise and regret.max() <= LARGEST_REGRET * noise)
    detail = f"{len(written)} tokens; at worst {regret.max():.1e} below the best logit, whose bf16 noise is {noise:.1e}"
    return Check("greedy text", passed, detail)


def compare_float32(name: str, fast: list[Tensors], truth: list[Tensors]) -> list[Check]:
    """In float32 next to nothing is left of rounding, so a wrong formula shows."""
    pairs = list(zip(fast, truth, strict=True))
    errors = {
        "loss of each token": max(_error(a["token_losses"], b["token_losses"]) for a, b in pairs),
        "gradient of each adapter": max(_error(a[key], b[key]) for a, b in pairs for key in gradients_of(b)),
    }
    return [
        Check(f"{name}, float32: {what}", error <= NEGLIGIBLE, f"relative error {error:.1e}, allowed {NEGLIGIBLE:.0e}")
        for what, error in errors.items()
    ]


def compare_bfloat16(name: str, fast: list[Tensors], reference: list[Tensors], truth: list[Tensors]) -> list[Check]:
    """Losses and gradients of a step on each part of a text: ours, the reference's, and its in float32.

    In bf16 the gradient of a trained model is at times mostly rounding (activations of a thousand meet others of
    one), and then which of two equally good computations is nearer to float32 is chance. What is wrong is wrong on
    every part. So on the part that speaks best for us the error has to be within bounds.
    """
    parts = list(zip(fast, reference, truth, strict=True))
    together = [no_worse(f"{name}: gradients", *map(_all_gradients, part)) for part in parts]
    losses = [no_worse(f"{name}: loss of each token", *(side["token_losses"] for side in part)) for part in parts]
    ratios = {key: min(_ratio(*(side[key] for side in part)) for part in parts) for key in gradients_of(truth[0])}
    worst = max(ratios, key=ratios.__getitem__)
    detail = f"of {len(ratios)}, the worst has {ratios[worst]:.2f} times the reference's error"
    return [
        _best(losses),
        _mean_loss(name, parts),
        _best(together),
        Check(f"{name}: gradient of each adapter", ratios[worst] <= SLACK_OF_ONE_TENSOR, detail),
    ]


def gradients_of(step: Tensors) -> list[str]:
    names = sorted(key for key in step if key.startswith("grad."))
    if not names:
        raise ValueError("no adapter has a gradient, so there is nothing to compare")
    return names


def _all_gradients(step: Tensors) -> NDArray[np.float32]:
    return np.concatenate([step[key].ravel() for key in gradients_of(step)])


def _best(checks: list[Check]) -> Check:
    return next((check for check in checks if check.passed), checks[0])


def _mean_loss(name: str, parts: Sequence[tuple[Tensors, ...]]) -> Check:
    """The loss that training takes: off by no more than the root mean square of the reference's errors a token."""
    off = [abs(float(fast["loss"][0] - truth["loss"][0])) for fast, _, truth in parts]
    bounds = [_root_mean_square(reference["token_losses"] - truth["token_losses"]) for _, reference, truth in parts]
    passed = all(o <= max(bound, NEGLIGIBLE) for o, bound in zip(off, bounds, strict=True))
    return Check(f"{name}: loss", passed, f"off by at most {max(off):.1e}, allowed {min(bounds):.1e}")


def no_worse(name: str, fast: Any, reference: Any, truth: Any) -> Check:
    ours, theirs = _error(fast, truth), _error(reference, truth)
    passed = bool(np.isfinite(ours)) and ours <= max(SLACK * theirs, NEGLIGIBLE)
    return Check(name, passed, f"relative error {ours:.2e}, the reference's {theirs:.2e}")


def _ratio(fast: Any, reference: Any, truth: Any) -> float:
    """Our error over the reference's, neither counted for less than what is negligible."""
    return max(_error(fast, truth), NEGLIGIBLE) / max(_error(reference, truth), NEGLIGIBLE)


def _root_mean_square(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _error(value: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Relative, in the Euclidean norm; NaN is an infinite error."""
    distance = float(np.linalg.norm((value - truth).astype(np.float64)))
    size = float(np.linalg.norm(truth.astype(np.float64)))
    return distance / max(size, 1e-30) if np.isfinite(distance) else float("inf")


def compare_curves(fast: NDArray[np.float32], reference: list[NDArray[np.float32]]) -> Check:
    """Ours and the reference's first are of the same seed, the others of other ones."""
    distance: Callable[..., float] = lambda a, b: float(np.mean(np.abs(a - b)))  # noqa: E731
    off = distance(fast, reference[0])
    noise = min(distance(a, b) for a, b in combinations(reference, 2))
    detail = f"{len(fast)} steps, off by {off:.1e} on average; two seeds differ by {noise:.1e}"
    return Check("training curve", bool(np.isfinite(fast).all()) and off <= noise, detail)
