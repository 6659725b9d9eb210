"""P: the kernels alone: 4-bit products as a share of the machine's bf16 peak, attention against torch's."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

from benchmarks.bench import Bench, RedCheckError
from benchmarks.figures import compare
from benchmarks.goals import GOALS
from benchmarks.machine import peak_binary
from benchmarks.options import ROOT
from benchmarks.turns import Lane, Worker, WorkerError, alternate, workers

PRODUCTS = (  # rows of x, then the weight: Llama-7B's, SmolLM2-135M's
    *((512, 4096, 4096), (512, 11008, 4096), (512, 4096, 11008)),
    *((512, 1536, 576), (512, 576, 1536), (512, 192, 576)),
)
ATTENTION = ((4, 9, 3, 512, 64), (1, 32, 8, 2048, 64), (1, 32, 8, 512, 128))
SMALL_PRODUCTS, SMALL_ATTENTION = ((64, 192, 576),), ((1, 2, 1, 64, 64),)
SCRIPTS = ("product", "attention", "block")  # written beside the kernels; what they print goes on the page as it is
SCRIPT_SECONDS = 900


def measure(bench: Bench) -> None:
    worker = bench.start("halfbyte_kernels", {})
    with workers(worker):
        here = worker.facts["has"]
        for kernel in ("product", "attention"):
            if kernel not in here:
                bench.results.add("note", text=f"This build has no {kernel} kernel to measure alone.")
        try:
            if "product" in here:
                _products(bench, worker)
            if "attention" in here:
                _attention(bench, worker)
        except WorkerError as error:
            raise RedCheckError(f"red: {error}") from error
    if not bench.options.smoke:
        _run_scripts(bench)


def _products(bench: Bench, worker: Worker) -> None:
    shapes = SMALL_PRODUCTS if bench.options.smoke else PRODUCTS
    lanes = [
        Lane(f"{who} {direction} {shape}", worker, _request(bench, "product", shape, who, direction))
        for shape in shapes
        for direction in ("forward", "backward")
        for who in ("halfbyte", "torch")
    ]
    has_peak = bool(bench.results.one("machine")["peaks"]["bf16_flops"])
    if not has_peak:
        bench.results.add("note", text="This processor has no bf16 dot products, so there is no peak to hold them to.")
    # In every round anew: the clock of a processor is not the same all the time.
    peak = bench.start("machine_peak", {"binary": str(peak_binary(bench.options))})
    with workers(peak):
        contestants = [Lane("peak", peak, {}), *lanes] if has_peak else lanes
        turns = alternate(contestants, bench.options.turns(), bench.options, bench.results, "P")
    for shape in shapes:
        for direction in ("forward", "backward"):
            ours, dense = (turns[f"{who} {direction} {shape}"] for who in ("halfbyte", "torch"))
            m, n, k = shape
            setting = str(ours[-1]["implementation"])
            title = f"4-bit product alone, {direction}, {m} rows, {n}×{k}; share of the bf16 peak"
            if has_peak:
                sides = (ours, setting), (turns["peak"], "dot products in registers alone")
                bench.row(replace(compare("P", title, "flop/s", *sides, GOALS["P product"]), ratio_of="share"))
            title = f"4-bit product alone, {direction}, {m} rows, {n}×{k}; against torch's dense bf16"
            bench.row(compare("P", title, "flop/s", (ours, setting), (dense, "torch, 16-bit weights"), None))


def _attention(bench: Bench, worker: Worker) -> None:
    shapes = SMALL_ATTENTION if bench.options.smoke else ATTENTION
    lanes = [
        Lane(f"{who} {shape}", worker, _request(bench, "attention", shape, who, "both"))
        for shape in shapes
        for who in ("halfbyte", "torch")
    ]
    turns = alternate(lanes, bench.options.turns(), bench.options, bench.results, "P")
    for shape in shapes:
        ours, theirs = (turns[f"{who} {shape}"] for who in ("halfbyte", "torch"))
        batch, heads, kv_heads, length, head_dim = shape
        title = f"causal attention alone, forward + backward, {batch}×{heads}({kv_heads})×{length}×{head_dim}"
        setting = str(ours[-1]["implementation"])
        sides = (ours, setting), (theirs, "torch's scaled_dot_product_attention")
        bench.row(compare("P", title, "flop/s", *sides, GOALS["P attention"]))


def _request(bench: Bench, kernel: str, shape: tuple[int, ...], who: str, direction: str) -> dict[str, Any]:
    seconds = 0.02 if bench.options.smoke else 0.5
    return {"kernel": kernel, "shape": shape, "who": who, "direction": direction, "seconds": seconds}


def _run_scripts(bench: Bench) -> None:
    for name in SCRIPTS:
        script = ROOT / "benchmarks" / f"{name}.py"
        if not script.exists():
            continue
        print(f"  P: benchmarks/{name}.py", file=sys.stderr)
        try:
            answer = subprocess.run(
                [bench.options.halfbyte_python, script],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=SCRIPT_SECONDS,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            bench.results.add("note", text=f"benchmarks/{name}.py did not end well: {type(error).__name__}.")
            continue
        bench.results.add("text", name=name, text=answer.stdout)
