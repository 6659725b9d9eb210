"""The gate: is what is about to be timed also right?

Nobody tuned the tolerances. A bf16 implementation is held to the error that the plain reference implementation has in
bf16, both measured against the reference in float32 (docs: "no further from float32 than the reference is"):

    kernels     `halfbyte doctor`'s self-test: every kernel that can run here, byte for byte
    weights     the codes and constants of a whole model, bit for bit
    loss        of every position of a batch, and the mean loss that training takes
    gradients   of every adapter, one by one and together
    decode      logits of tokens fed one by one
    curve       50 steps of training: no further from the reference's losses than another seed's are
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.alpaca_like import write_rows
from benchmarks.bench import Bench, RedCheckError
from benchmarks.turns import workers

Tensors = dict[str, NDArray[np.float32]]

# The model as transformers wrote it, over the plain torch implementation of every op.
PLAIN, REFERENCE = {"fast": False}, {"HALFBYTE_IMPLEMENTATION": "reference"}
# How much larger than the reference's an error may be: over millions of values, the same rounding in another order
# moves it by a few per cent; over the few thousand values of one adapter, by more.
SLACK, SLACK_OF_ONE_TENSOR = 1.25, 2.0
# Where the reference hits float32 almost exactly, an error this small is nothing.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def check_all(bench: Bench, models: dict[str, Path]) -> None:
    """Run the gate over the models that will be timed.  Raises RedCheckError if any check is red."""
    checks = [_kernels()]
    for name, model in models.items():
        checks += _compare_model(bench, name, model)
    if bench.options.model in models.values():
        checks.append(_curve(bench, bench.options.model))
    for check in checks:
        bench.results.add("check", name=check.name, passed=check.passed, detail=check.detail)
        print(f"  {'ok ' if check.passed else 'RED'} {check.name}: {check.detail}", file=sys.stderr)
    red = [check.name for check in checks if not check.passed]
    if red:
        raise RedCheckError(f"red: {', '.join(red)}. Nothing was timed.")


def _kernels() -> Check:
    from halfbyte.recipes.doctor import examine

    report = examine()
    red = [f"{check.op} ({check.implementation}): {check.detail}" for check in report.checks if not check.passed]
    return Check("kernels", report.healthy, "; ".join(red) or f"{len(report.checks)} comparisons with the reference")


def _compare_model(bench: Bench, name: str, model: Path) -> list[Check]:
    sizes = bench.options.sizes
    requests = {
        "step": {"check": "step", "batch": 2, "length": min(128, sizes.length)},
        "decode": {"check": "decode", "prompt_tokens": sizes.prompt_tokens, "new_tokens": 8},
    }
    found = {
        who: _ask(bench, f"{name}-{who}", {"model": str(model), **settings}, requests, environment)
        for who, settings, environment in (
            ("fast", {}, {}),
            ("reference", PLAIN, REFERENCE),
            ("float32", {**PLAIN, "dtype": "float32"}, REFERENCE),
        )
    }
    (fast, facts), (reference, reference_facts), (truth, _) = (answers["step"] for answers in found.values())
    logits = (answers["decode"][0]["logits"] for answers in found.values())
    return [
        Check(
            f"{name}: weights",
            facts["weights"] == reference_facts["weights"],
            f"sha256 {facts['weights'][:12]} by {facts['implementation']},"
            f" {reference_facts['weights'][:12]} by {reference_facts['implementation']}",
        ),
        *compare_step(name, fast, reference, truth),
        no_worse(f"{name}: decode", *logits),
    ]


def compare_step(name: str, fast: Tensors, reference: Tensors, truth: Tensors) -> list[Check]:
    """Losses and gradients of one step: ours, the reference's in the same dtype, and the reference's in float32."""
    names = sorted(key for key in truth if key.startswith("grad."))
    if not names:
        raise ValueError("no adapter has a gradient, so there is nothing to compare")
    together = [np.concatenate([side[key].ravel() for key in names]) for side in (fast, reference, truth)]
    worst, ratio = "", 0.0
    for key in names:
        ours, theirs = (_error(side[key], truth[key]) for side in (fast, reference))
        if ours > NEGLIGIBLE and ours / max(theirs, NEGLIGIBLE) > ratio:
            worst, ratio = key, ours / max(theirs, NEGLIGIBLE)
    # The mean of errors is at most their root mean square, so this bound holds for whatever rounds as the reference.
    bound = float(np.sqrt(np.mean((reference["token_losses"] - truth["token_losses"]) ** 2)))
    off = abs(float(fast["loss"][0] - truth["loss"][0]))
    return [
        no_worse(f"{name}: loss of each token", *(side["token_losses"] for side in (fast, reference, truth))),
        Check(f"{name}: loss", off <= max(bound, NEGLIGIBLE), f"off by {off:.1e}, allowed {bound:.1e}"),
        no_worse(f"{name}: gradients", *together),
        Check(
            f"{name}: gradient of each adapter",
            ratio <= SLACK_OF_ONE_TENSOR,
            f"of {len(names)}, the worst has {ratio:.2f} times the reference's error {worst.removeprefix('grad.')}",
        ),
    ]


def no_worse(name: str, fast: Any, reference: Any, truth: Any) -> Check:
    ours, theirs = _error(fast, truth), _error(reference, truth)
    passed = bool(np.isfinite(ours)) and ours <= max(SLACK * theirs, NEGLIGIBLE)
    return Check(name, passed, f"relative error {ours:.2e}, the reference's {theirs:.2e}")


def _error(value: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """Relative, in the Euclidean norm; NaN is an infinite error."""
    distance = float(np.linalg.norm((value - truth).astype(np.float64)))
    size = float(np.linalg.norm(truth.astype(np.float64)))
    return distance / max(size, 1e-30) if np.isfinite(distance) else float("inf")


def _curve(bench: Bench, model: Path) -> Check:
    rows = bench.options.directory / "curve.jsonl"
    write_rows(rows, 4 * bench.options.sizes.curve_steps, seed=1)
    asked = {"check": "curve", "rows": str(rows), "length": 64, "batch": 4, "steps": bench.options.sizes.curve_steps}
    settings = {"model": str(model)}
    seeds = {f"seed-{seed}": {**asked, "seed": seed} for seed in range(3)}
    fast = _ask(bench, "curve-fast", settings, {"seed-0": seeds["seed-0"]}, {})["seed-0"][0]["losses"]
    found = _ask(bench, "curve-reference", {**settings, **PLAIN}, seeds, REFERENCE)
    return compare_curves(fast, [found[seed][0]["losses"] for seed in seeds])


def compare_curves(fast: NDArray[np.float32], reference: list[NDArray[np.float32]]) -> Check:
    """Ours and the reference's first are of the same seed, the others of other ones."""
    distance: Callable[..., float] = lambda a, b: float(np.mean(np.abs(a - b)))  # noqa: E731
    off = distance(fast, reference[0])
    noise = min(distance(a, b) for a, b in combinations(reference, 2))
    detail = f"{len(fast)} steps, off by {off:.1e} on average; two seeds differ by {noise:.1e}"
    return Check("training curve", bool(np.isfinite(fast).all()) and off <= noise, detail)


def _ask(
    bench: Bench,
    name: str,
    settings: dict[str, Any],
    requests: dict[str, dict[str, Any]],
    environment: dict[str, str],
) -> dict[str, tuple[Tensors, dict[str, Any]]]:
    """Each request's tensors and what the worker said beside them."""
    print(f"  checking: {name}", file=sys.stderr)
    worker = bench.start("halfbyte_check", settings, **environment)
    answers = {}
    with workers(worker):
        for key, request in requests.items():
            path = bench.options.directory / "check" / f"{name}-{key}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = worker.measure({**request, "path": str(path)})
            answers[key] = (load_file(path), facts)
            path.unlink()
    return answers
