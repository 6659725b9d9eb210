"""D: from a model's files, in the page cache, to a 4-bit model with adapters on it, ready to train."""

from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.figures import Goal, compare
from benchmarks.goals import GOALS
from benchmarks.models import big_layers, file_bytes, four_bits
from benchmarks.turns import Lane, alternate, workers


def measure(bench: Bench) -> None:
    small, large = bench.options.model, big_layers(bench)
    names = {small: "SmolLM2-135M", large: f"two layers of {bench.options.sizes.hidden}"}
    for model, name in names.items():
        title = f"quantizing load, {name}, {_megabytes(model)} of 16-bit safetensors"
        _contest(bench, model, f"D {name}", title, quantize=True, goal=GOALS["D quantizing load"])
    for model, name in names.items():
        checkpoint = four_bits(bench, model)
        title = f"opening a saved 4-bit checkpoint, {name}, {_megabytes(checkpoint)}"
        _contest(bench, checkpoint, f"D {name}, 4-bit", title, quantize=False, goal=None)


def _contest(bench: Bench, model: Path, label: str, title: str, quantize: bool, goal: Goal | None) -> None:
    request = {"model": str(model), "quantize": quantize}
    ours, peer = bench.start("halfbyte_load", {}), bench.start("peer_load", {})
    with workers(ours, peer):
        lanes = [Lane("halfbyte", ours, request), Lane("peer", peer, request)]
        turns = alternate(lanes, bench.options.turns(), bench.options, bench.results, label)
    setting = str(turns["halfbyte"][-1]["implementation"])
    peer_setting = "transformers + bitsandbytes + PEFT"
    bench.row(compare("D", title, "s", (turns["halfbyte"], setting), (turns["peer"], peer_setting), goal))


def _megabytes(model: Path) -> str:
    return f"{file_bytes(model) / 1e6:,.0f} MB"
