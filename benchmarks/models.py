"""The models that the workloads need, made once below runs/bench and kept."""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.turns import workers


def big_layers(bench: Bench) -> Path:
    """Two Llama-7B-sized decoder layers of random 16-bit weights, with a small vocabulary."""
    sizes = bench.options.sizes
    return _made(
        bench,
        f"layers-{sizes.hidden}-{sizes.intermediate}",
        {
            "make": "layers",
            "hidden": sizes.hidden,
            "intermediate": sizes.intermediate,
            "tokenizer_from": str(bench.options.model),
        },
    )


def four_bits(bench: Bench, model: Path) -> Path:
    """The model as a 4-bit checkpoint in bitsandbytes' layout, which both sides read."""
    return _made(bench, f"{model.name}-4bit", {"make": "four_bits", "model": str(model)})


def file_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _made(bench: Bench, name: str, request: dict[str, Any]) -> Path:
    path = bench.options.directory / "models" / name
    # Written last, so that what an interrupted run leaves behind is made again.
    stamp = path / "made.json"
    if not stamp.exists():
        shutil.rmtree(path, ignore_errors=True)
        worker = bench.start("halfbyte_prepare", {})
        with workers(worker):
            worker.measure({**request, "path": str(path)})
        stamp.write_text(json.dumps(request))
    return path
