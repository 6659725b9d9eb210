"""Small fine-tuning runs: rows to learn from, a configuration, and what a run leaves behind."""

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from halfbyte import FinetuneConfig, RunResult
from halfbyte.recipes.finetune import finetune

ANSWERS = ("yes", "no, not at all", "it depends on what is meant by that", "certainly")


def write_rows(path: Path, rows: int = 12, first: int = 0) -> Path:
    """Questions of very different lengths, and answers that follow from them; those of another `first` are others."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Is {index} " + "very " * (index * 5 % 11) + "good?"},
                {"role": "assistant", "content": ANSWERS[index % len(ANSWERS)]},
            ]
        }
        for index in range(first, first + rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def configure(model: Path, dataset: Path, output_dir: Path, /, **changes: Any) -> FinetuneConfig:
    """Eight steps of four rows: of twelve rows that is two epochs and two steps of a third."""
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "dataset": str(dataset),
        "output_dir": str(output_dir),
        "max_length": 128,
        "packing": False,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "report_to": [],
    }
    return FinetuneConfig.model_validate(values | changes)


def run(config: FinetuneConfig) -> tuple[RunResult, str]:
    """The result, and what was said."""
    console = Console(file=io.StringIO(), width=200)
    result = finetune(config, console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(output_dir: Path) -> bytes:
    return (output_dir / "adapter_model.safetensors").read_bytes()
