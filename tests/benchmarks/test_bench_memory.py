"""`make bench-memory`: checkpoints of random weights that load and learn, and the figures on the page."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import page
from benchmarks.memory.checkpoints import VOCABULARY, write_checkpoint
from benchmarks.memory.watch import watch
from halfbyte import Linear4bit, load_model


def test_a_checkpoint_of_random_weights_loads_whole_and_is_finite(smollm2_gguf: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "tiny", smollm2_gguf)
    model, tokenizer = load_model(str(tmp_path / "tiny"))
    ids = tokenizer("Numbers do not matter here, but they must be numbers.", return_tensors="pt").input_ids
    assert int(ids.max()) < VOCABULARY
    assert tokenizer.decode(ids[0]).startswith("Numbers do not")
    assert model(input_ids=ids).logits.isfinite().all()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 3 * 7
    assert layers[0].quantized.dequantize(torch.float32).std() == pytest.approx(0.02, rel=0.1)
    with (tmp_path / "tiny" / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    starts = [entry["data_offsets"][0] for name, entry in header.items() if name.endswith("_proj.weight")]
    assert all((8 + size + start) % 64 == 0 for start in starts)


def test_what_a_process_held_is_seen(tmp_path: Path) -> None:
    held = "import time; held = b'x' * 200_000_000; time.sleep(0.1)"
    watched = watch([sys.executable, "-c", held], tmp_path / "log", {}, 60)
    assert watched.returncode == 0
    assert 200e6 < watched.anonymous_bytes < 260e6
    assert watched.anonymous_bytes < watched.resident_bytes < watched.anonymous_bytes + watched.pages_bytes + 1e6
    assert watch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", {}, 0.2).returncode == -9


def record(**changes: Any) -> dict[str, Any]:
    goals = {"resident_goal": 2.0, "anonymous_goal": None}
    values = {"name": "a model, 1 × 512, r 16", "setting": goals, "level": "full", "failure": None}
    sizes = {"planned_bytes": 1.8e9, "resident_bytes": 2.0e9, "anonymous_bytes": 1.5e9, "memory_bytes": 24e9}
    return values | sizes | {"step_seconds": [30.2, 29.0]} | changes


def test_a_row_says_what_was_planned_measured_and_wanted() -> None:
    assert page.describe(record()) == (
        "| a model, 1 × 512, r 16 | full | 1.80 | 2.00 | 0.900 | 1.50 | resident ≤ 2: met | 30 s |"
    )
    assert "resident ≤ 2: **missed**" in page.describe(record(resident_bytes=2.01e9))
    assert "| 38.00 | 22.00 | – |" in page.describe(record(planned_bytes=38e9, resident_bytes=22e9))
    assert "failed: Killed" in page.describe(record(failure="Killed"))


def test_figures_take_the_place_of_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page.subprocess, "run", lambda *_, **__: page.subprocess.CompletedProcess([], 1, "", "no plot"))
    target = tmp_path / "memory.md"
    target.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_figures([record(level="none"), record()], target)
    page.write_figures([record(level="none"), record()], target)
    text = target.read_text()
    assert text.startswith(f"before\n{page.BEGIN}\n")
    assert text.endswith(f"{page.END}\nafter\n")
    assert "old" not in text
    assert text.count("a model") == 1  # the last of each run
    assert "| full |" in text
