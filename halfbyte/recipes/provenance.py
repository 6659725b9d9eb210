"""run.json: what a run was told, with which versions, from which base and which data; and what others read of it."""

import hashlib
import json
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint.files import write_json
from halfbyte.checkpoint.fingerprint import file_sha256
from halfbyte.checkpoint.output import RUN_FILE
from halfbyte.config import FinetuneConfig
from halfbyte.data import Source, is_local, source_files
from halfbyte.ops import active_implementation
from halfbyte.recipes.data_sources import held_out_sources, training_sources

_PACKAGES = ("halfbyte", "torch", "transformers", "peft", "safetensors", "tokenizers")


def write_run_file(
    directory: Path,
    config: FinetuneConfig,
    base_sha256: str,
    recomputation: dict[str, Any],
    result: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write `run.json`; `result` is there once the run is done."""
    said = {"dataset": training_sources(config), "eval_dataset": held_out_sources(config)}
    data = {name: [_told(source) for source in sources] for name, sources in said.items() if sources}
    write_json(
        directory / RUN_FILE,
        {
            "versions": versions(),
            "machine": {"processor": platform.machine(), "kernels": active_implementation()},
            "base_model": {"name_or_path": config.model_name_or_path, "weights_sha256": base_sha256},
            "tokenizer": None if tokenizer is None else tokenizer_fingerprints(tokenizer),
            "data": data,
            "config": config.to_dict(),
            "recomputation": recomputation,
            "result": result,
        },
    )


def _told(source: Source) -> dict[str, Any]:
    """What a set of data was called, and the SHA-256 of each file it was read from; a hub id has none."""
    files = source_files(source) if is_local(source.path) else []
    return {
        "path": source.path,
        "split": source.split,
        "sha256": {str(file): file_sha256(file) for file in files},
    }


def versions() -> dict[str, str]:
    """Of Python, of halfbyte and of what decides the numbers beside it."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def tokenizer_fingerprints(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """SHA-256 of the vocabulary (every token with its id), and of the chat template's text."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), ensure_ascii=False)
    template = tokenizer.chat_template
    text = None if template is None else json.dumps(template, ensure_ascii=False, sort_keys=True)
    return {
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
    }


@dataclass(frozen=True)
class Origin:
    """What a saved adapter's run says of where it came from; empty for an adapter of another program's."""

    base_name: str | None = None
    base_sha256: str | None = None
    quantization: dict[str, Any] | None = None  # quant_type, block_size, double_quant, compute_dtype
    tokenizer: dict[str, str | None] | None = None
    run: dict[str, Any] | None = None  # all of run.json


def read_origin(adapter: Path) -> Origin:
    """From the `run.json` beside an adapter, or above it where it is a checkpoint's; what is not there is None."""
    for directory in (adapter, adapter.parent if adapter.name.startswith("checkpoint-") else adapter):
        try:
            run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
            config, base = run["config"], run["base_model"]
            return Origin(
                base_name=base["name_or_path"],
                base_sha256=base["weights_sha256"],
                quantization={
                    key: config[key] for key in ("quant_type", "block_size", "double_quant", "compute_dtype")
                },
                tokenizer=run.get("tokenizer"),
                run=run,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return Origin()


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had."""
    try:  # not ru_maxrss where it can be helped: a child inherits its parent's
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
