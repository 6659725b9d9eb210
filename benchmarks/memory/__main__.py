"""What runs hold, planned and measured; writes the figures of docs/memory.md.

    python -m benchmarks.memory [--models SmolLM2-135M,7B,13B,33B,65B] [--threads N] [--smoke]
    python -m benchmarks.memory --results FILE...      the page from earlier measurements, the last of each run

For every setting `halfbyte plan` is asked and then `halfbyte finetune` is run, each in a process of its own. Llama
models are random weights in 4 bits (checkpoints.py), written to runs/memory one at a time and removed after use; one
for which the disk has no room is left out, and that is said.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.alpaca_like import make_rows
from benchmarks.memory.checkpoints import checkpoint_bytes, write_checkpoint
from benchmarks.memory.page import describe, write_figures
from benchmarks.memory.settings import SETTINGS, SMOKE, SMOLLM2, Setting
from benchmarks.memory.watch import watch
from benchmarks.options import ROOT, Options
from benchmarks.results import Results, read_results

DIRECTORY = ROOT / "runs/memory"
REAL_MODEL = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
LONGEST_SECONDS = 3600
SPARE_DISK_BYTES = 4 << 30


def main() -> None:
    arguments = parse_arguments()
    page = arguments.page or ROOT / "docs/memory.md"
    if arguments.results:
        write_figures([record for path in arguments.results for record in read_results(path).all("memory")], page)
        return
    settings = SMOKE if arguments.smoke else SETTINGS
    names = arguments.models.split(",") if arguments.models else list(dict.fromkeys(s.model for s in settings))
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    results = Results(DIRECTORY / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.jsonl")
    rows = write_rows(DIRECTORY / "rows.jsonl")
    failed = []
    for name in names:
        model = prepare(name)
        if model is None:
            failed.append(name)
            continue
        try:
            for setting in (s for s in settings if s.model == name):
                record = results.add("memory", **measure(setting, model, rows, arguments.threads))
                print(describe(record), flush=True)
                if record["failure"]:
                    failed.append(setting.name)
        finally:
            if name != SMOLLM2:
                shutil.rmtree(model)
    if not arguments.smoke and names == list(dict.fromkeys(s.model for s in SETTINGS)):
        write_figures(results.all("memory"), page)
    if failed:
        sys.exit(f"error: not measured: {'; '.join(failed)}")


def prepare(name: str) -> Path | None:
    """The model's directory; None, and a word about it, where the disk has no room for it."""
    if name == SMOLLM2:
        return smollm2()
    directory = DIRECTORY / name
    shutil.rmtree(directory, ignore_errors=True)  # of a measurement that was cut short
    needed, free = checkpoint_bytes(name) + SPARE_DISK_BYTES, shutil.disk_usage(DIRECTORY).free
    if needed > free:
        print(f"{name} is left out: it takes {needed / 1e9:.0f} GB of disk and {free / 1e9:.0f} are free", flush=True)
        return None
    try:
        write_checkpoint(directory, name, REAL_MODEL)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def smollm2() -> Path:
    """The real model in 16-bit safetensors, as the hub has it; made once."""
    directory = DIRECTORY / SMOLLM2
    if not directory.exists():
        import halfbyte

        model, tokenizer = halfbyte.load_model(str(REAL_MODEL), quant_type="none", fast=False)
        aside = directory.with_suffix(".new")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(directory)
    return directory


def write_rows(file: Path, rows: int = 64) -> Path:
    """Rows of some five thousand tokens, so that every one is cut to `max_length` exactly."""
    words = " ".join(row["output"] for row in make_rows(120)).split()
    with file.open("w", encoding="utf-8") as target:
        for index in range(rows):
            answer = " ".join(words[7 * index : 7 * index + 4000])
            turns = [{"role": "user", "content": f"Question {index}"}, {"role": "assistant", "content": answer}]
            target.write(json.dumps({"messages": turns}) + "\n")
    return file


def measure(setting: Setting, model: Path, rows: Path, threads: int) -> dict[str, Any]:
    """What `halfbyte plan` foretells and what `halfbyte finetune` then takes."""
    output = DIRECTORY / "run"
    shutil.rmtree(output, ignore_errors=True)
    configuration = {
        "model_name_or_path": str(model),
        "dataset": str(rows),
        "output_dir": str(output),
        "packing": "false",
        "threads": str(threads),
        "report_to": "none",
        **setting.configuration(),
    }
    flags = [word for key, value in configuration.items() for word in (f"--{key}", value)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "halfbyte.cli", "plan", *flags, "--json", "--no_time"]
    planned = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    command = [sys.executable, "-m", "halfbyte.cli", "finetune", *flags]
    log = DIRECTORY / "run.log"
    watched = watch(command, log, environment, LONGEST_SECONDS)
    record = {
        "name": setting.name,
        "setting": asdict(setting),
        "threads": threads,
        "seconds": watched.seconds,
        "resident_bytes": watched.resident_bytes,
        "anonymous_bytes": watched.anonymous_bytes,
        "pages_bytes": watched.pages_bytes,
        "failure": None,
    }
    if planned.returncode or watched.returncode:
        return record | {"failure": (planned.stderr + watched.output)[-2000:]}
    run = json.loads((output / "run.json").read_text())
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return record | {
        "plan": json.loads(planned.stdout),
        "level": run["recomputation"]["level"],
        "planned_bytes": run["result"]["planned_bytes"],
        "losses": finite(step["loss"] for step in steps),
        "grad_norms": finite(step["grad_norm"] for step in steps),
        "step_seconds": [step["step_seconds"] for step in steps],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def finite(values: Iterable[float]) -> list[float]:
    found = list(values)
    if any(value - value for value in found):  # neither NaN nor an infinity is zero away from itself
        raise ValueError(f"not finite: {found}")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="some of SmolLM2-135M,7B,13B,33B,65B; all unless given")
    parser.add_argument("--threads", type=int, default=Options().threads)
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does the harness work?")
    parser.add_argument("--page", type=Path, help="the page whose figures are replaced; docs/memory.md unless given")
    parser.add_argument("--results", type=Path, nargs="+", help="measure nothing: files of runs/memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
