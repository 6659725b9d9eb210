"""The gate: is what is about to be timed also right?

In float32 the fast path has to agree with the reference. In bf16 it is held to the error that the reference has in
bf16, both measured against the reference in float32:

    kernels     `halfbyte doctor`'s self-test: every kernel that can run here
    weights     the codes and constants of a whole model, bit for bit
    loss        of every position of a batch, and the mean loss that training takes
    gradients   of every adapter, one by one and together
    decode      logits of tokens fed one by one
    text        what `halfbyte generate` writes, by the judgement of the float32 reference
    curve       50 steps of training: no further from the reference's losses than those of another seed are
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from benchmarks.agreement import Check, Tensors, compare_bfloat16, compare_curves, compare_float32, judge, no_worse
from benchmarks.alpaca_like import write_rows
from benchmarks.bench import Bench, RedCheckError
from benchmarks.options import ROOT
from benchmarks.turns import workers

Answers = dict[str, tuple[Tensors, dict[str, Any]]]  # of each request: tensors, and what was said beside them

PARTS = 3  # of a text, each a batch of its own

# The model as transformers wrote it, over the plain torch implementation of every op.
PLAIN, REFERENCE = {"fast": False}, {"HALFBYTE_IMPLEMENTATION": "reference"}


def check_all(bench: Bench, models: dict[str, Path]) -> None:
    """Run the gate over the models that will be timed.  Raises RedCheckError if any check is red."""
    red = []
    for check in _checks(bench, models):
        bench.results.add("check", name=check.name, passed=check.passed, detail=check.detail)
        print(f"  {'ok ' if check.passed else 'RED'} {check.name}: {check.detail}", file=sys.stderr)
        if not check.passed:
            red.append(check.name)
    if red:
        raise RedCheckError(f"red: {', '.join(red)}. Nothing was timed.")


def _checks(bench: Bench, models: dict[str, Path]) -> Iterator[Check]:
    yield _kernels()
    for name, model in models.items():
        yield from _compare_model(bench, name, model)
    if bench.options.model in models.values():
        yield _greedy_text(bench, bench.options.model)
        yield _curve(bench, bench.options.model)


def _kernels() -> Check:
    from halfbyte.recipes.doctor import examine

    report = examine()
    red = [f"{check.op} ({check.implementation}): {check.detail}" for check in report.checks if not check.passed]
    return Check("kernels", report.healthy, "; ".join(red) or f"{len(report.checks)} comparisons with the reference")


def _compare_model(bench: Bench, name: str, model: Path) -> list[Check]:
    text = {"text": str(ROOT / "LICENSE")}
    requests: dict[str, dict[str, Any]] = {
        **{f"step {part}": {"check": "step", "part": part, **text} for part in range(PARTS)},
        "decode": {"check": "decode", "part": 0, **text},
    }
    fast = _ask(bench, f"{name}-fast", {"model": str(model)}, requests, {})
    fast_float32 = _ask(bench, f"{name}-fast-float32", {"model": str(model), "dtype": "float32"}, requests, {})
    reference, truth = (
        _ask(bench, f"{name}-{dtype}", {"model": str(model), "dtype": dtype, **PLAIN}, requests, REFERENCE)
        for dtype in ("bfloat16", "float32")
    )
    facts, reference_facts = fast["decode"][1], reference["decode"][1]
    exact, steps = _steps(fast_float32), [_steps(side) for side in (fast, reference, truth)]
    return [
        Check(
            f"{name}: weights",
            facts["weights"] == reference_facts["weights"],
            f"sha256 {facts['weights'][:12]} by {facts['implementation']},"
            f" {reference_facts['weights'][:12]} by {reference_facts['implementation']}",
        ),
        *compare_float32(name, exact, steps[-1]),
        *compare_bfloat16(name, *steps),
        no_worse(f"{name}: decode", *(side["decode"][0]["logits"] for side in (fast, reference, truth))),
    ]


def _steps(answers: Answers) -> list[Tensors]:
    return [answers[f"step {part}"][0] for part in range(PARTS)]


def _greedy_text(bench: Bench, model: Path) -> Check:
    prompt = {"prompt": bench.options.sizes.prompt}
    written = {"check": "written", "new_tokens": min(32, bench.options.sizes.new_tokens), **prompt}
    ids = _ask(bench, "text-fast", {"model": str(model)}, {"written": written}, {})["written"][0]["ids"]
    judged = {"judged": {"check": "judged", "ids": ids.tolist(), **prompt}}
    reference, truth = (
        _ask(bench, f"text-{dtype}", {"model": str(model), "dtype": dtype, **PLAIN}, judged, REFERENCE)["judged"][0]
        for dtype in ("bfloat16", "float32")
    )
    return judge(ids, reference["logits"], truth["logits"])


def _curve(bench: Bench, model: Path) -> Check:
    rows = bench.options.directory / "curve.jsonl"
    write_rows(rows, 4 * bench.options.sizes.curve_steps, seed=1)
    asked = {"check": "curve", "rows": str(rows), "length": 64, "batch": 4, "steps": bench.options.sizes.curve_steps}
    settings = {"model": str(model)}
    seeds = {f"seed-{seed}": {**asked, "seed": seed} for seed in range(3)}
    fast = _ask(bench, "curve-fast", settings, {"seed-0": seeds["seed-0"]}, {})["seed-0"][0]["losses"]
    found = _ask(bench, "curve-reference", {**settings, **PLAIN}, seeds, REFERENCE)
    return compare_curves(fast, [found[seed][0]["losses"] for seed in seeds])


def _ask(
    bench: Bench,
    name: str,
    settings: dict[str, Any],
    requests: dict[str, dict[str, Any]],
    environment: dict[str, str],
) -> Answers:
    worker = bench.start("halfbyte_check", settings, **environment)
    answers = {}
    with workers(worker):
        for key, request in requests.items():
            path = bench.options.directory / "check" / f"{name}-{key}.safetensors".replace(" ", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = worker.measure({**request, "path": str(path)})
            answers[key] = (load_file(path), facts)
            path.unlink()
    return answers
