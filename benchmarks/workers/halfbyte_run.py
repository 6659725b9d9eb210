"""halfbyte: a whole fine-tuning run over Alpaca-like rows (workload B)."""

import io
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from protocol import Measure, Reply, Request, serve
from rich.console import Console

from halfbyte.config import FinetuneConfig
from halfbyte.data import encode_rows, read_rows
from halfbyte.huggingface import load_tokenizer
from halfbyte.recipes import finetune as recipe


def prepare(settings: Request) -> tuple[Measure, Reply]:
    torch.set_num_threads(settings["threads"])
    tokenizer = load_tokenizer(settings["model"])
    rows = list(read_rows(settings["rows"], "alpaca"))
    examples, _ = encode_rows(tokenizer, rows, settings["max_length"])
    lengths = [len(example.input_ids) for example in examples]
    clock = TrainingClock()

    def measure(request: Request) -> Reply:
        config = FinetuneConfig(
            model_name_or_path=settings["model"],
            dataset=_first_rows(settings["rows"], request["limit"]),
            dataset_format="alpaca",
            max_length=settings["max_length"],
            output_dir=settings["output_dir"],
            overwrite_output_dir=True,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            report_to=[],
        )
        started = time.perf_counter()
        result = recipe.finetune(config, Console(file=io.StringIO()))
        whole_call = time.perf_counter() - started
        saved = _adapter_bytes(Path(config.output_dir))
        metrics = _metrics(Path(config.output_dir))
        shutil.rmtree(config.output_dir)
        return {
            "seconds": clock.seconds,
            "whole_call_seconds": whole_call,
            "units": sum(line["tokens"] for line in metrics),
            "steps": result.steps,
            "first_loss": metrics[0]["loss"],
            "loss": result.loss,
            "sound": saved > 0 and math.isfinite(result.loss),
        }

    return measure, {"useful_tokens": sum(lengths[: settings["count_rows"]])}


class TrainingClock:
    """Times `Run.execute`: from the start of training, model and data being ready, to the saved adapter."""

    def __init__(self) -> None:
        self.seconds = math.nan
        execute = recipe.Run.execute

        def timed(run: Any) -> Any:
            started = time.perf_counter()
            result = execute(run)
            self.seconds = time.perf_counter() - started
            return result

        recipe.Run.execute = timed


def _first_rows(path: str, limit: int) -> str:
    """A file of the first `limit` rows beside the whole one."""
    source = Path(path)
    part = source.with_name(f"{source.stem}-{limit}.jsonl")
    part.write_text("".join(source.read_text().splitlines(keepends=True)[:limit]))
    return str(part)


def _adapter_bytes(directory: Path) -> int:
    return (directory / "adapter_model.safetensors").stat().st_size


def _metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    serve(prepare)
