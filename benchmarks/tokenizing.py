"""What `halfbyte finetune` does with its data before it loads a model: the first time, and from the cache.

    python -m benchmarks.tokenizing [--rows 100000] [--warm 3] [--threads N] [--model DIRECTORY]

Rows like Alpaca's (alpaca_like.py, from a seed) are read, checked, tokenized and kept once with an empty cache, and
then recalled; each time by a process of its own. Told are, of `read_data` alone, seconds and rows a second, what
packing takes behind it, and memory in MB:

    before    of the process when it has imported everything and read the tokenizer
    process   the largest resident set of the process
    together  with those that tokenize for it, and pages that several processes share counted in parts (PSS, sampled)
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.alpaca_like import write_rows
from benchmarks.options import ROOT, Options

DIRECTORY = ROOT / "runs/tokenizing"
SAMPLE_SECONDS = 0.5  # asking costs some milliseconds of the process itself


def main() -> None:
    arguments = parse_arguments()
    if arguments.once:
        print(json.dumps(read_once(arguments)))
        return
    shutil.rmtree(DIRECTORY / "cache", ignore_errors=True)
    write_rows(DIRECTORY / "rows.jsonl", arguments.rows)
    for kind in ("cold", *["warm"] * arguments.warm):
        print(describe(kind, measure(arguments)), flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One reading, in a process that begins with it."""
    flags = [f"--model={arguments.model}", f"--threads={arguments.threads}", "--once"]
    command = [sys.executable, "-m", "benchmarks.tokenizing", *flags]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            most = max(most, together(watched))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018
        if process.returncode:
            sys.exit(process.stderr.read())
        return json.loads(process.stdout.read()) | {"together_bytes": most}


def together(process: psutil.Process) -> int:
    """Bytes of it and its descendants: what several of them share is counted once, in parts."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total


def read_once(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `finetune` does before its plan."""
    from rich.console import Console

    from halfbyte.config import FinetuneConfig
    from halfbyte.data import pack
    from halfbyte.huggingface import prepare_tokenizer
    from halfbyte.recipes.provenance import peak_resident_bytes
    from halfbyte.recipes.tokenizing import read_data

    config = FinetuneConfig.model_validate(
        {
            "model_name_or_path": str(arguments.model),
            "dataset": str(DIRECTORY / "rows.jsonl"),
            "data_cache_dir": str(DIRECTORY / "cache"),
            "output_dir": str(DIRECTORY / "out"),
            "threads": arguments.threads,
        }
    )
    tokenizer = prepare_tokenizer(config.model_name_or_path, None, config.chat_template, config.system_prompt)
    before = peak_resident_bytes()
    began = time.perf_counter()
    train, _ = read_data(config, tokenizer, Console(stderr=True))
    seconds = time.perf_counter() - began
    packed = len(pack(train, config.max_length))
    return {
        "rows": len(train),
        "packed": packed,
        "seconds": seconds,
        "packing_seconds": time.perf_counter() - began - seconds,
        "before_bytes": before,
        "process_bytes": peak_resident_bytes(),
    }


def describe(kind: str, told: dict[str, Any]) -> str:
    megabytes = {name: f"{told[f'{name}_bytes'] / 1e6:.0f}" for name in ("before", "process", "together")}
    return (
        f"{kind}: {told['rows']:,} rows in {told['seconds']:.2f} s, {told['rows'] / told['seconds']:,.0f} rows/s;"
        f" packed into {told['packed']:,} in {told['packing_seconds']:.2f} s;"
        f" MB: before {megabytes['before']}, process {megabytes['process']}, together {megabytes['together']}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizing", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--warm", type=int, default=3, help="how often it is recalled")
    parser.add_argument("--threads", type=int, default=Options().threads)
    parser.add_argument("--model", type=Path, default=Options().model, help="where its tokenizer is")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
