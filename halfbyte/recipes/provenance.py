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

from torch import nn
from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint.adapter import QUANTIZATION_KEYS, is_record, read_record
from halfbyte.checkpoint.files import write_json
from halfbyte.checkpoint.fingerprint import file_sha256
from halfbyte.checkpoint.output import RUN_FILE
from halfbyte.config import FinetuneConfig
from halfbyte.data import Source, is_local, source_files
from halfbyte.nn import Linear4bit
from halfbyte.ops import active_implementation
from halfbyte.recipes.data_sources import held_out_sources, training_sources

_PACKAGES = ("halfbyte", "torch", "transformers", "peft", "safetensors", "tokenizers")


def make_record(
    config: FinetuneConfig, model: nn.Module, base_sha256: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What a run is made from, by fingerprints: base, quantization, tokenizer and template, data; and the versions.

    Args:
        model: in 4 bits, as it is trained on.
    """
    said = {"dataset": training_sources(config), "eval_dataset": held_out_sources(config)}
    return {
        "versions": versions(),
        "base_model": {"name_or_path": config.model_name_or_path, "weights_sha256": base_sha256},
        "quantization": quantization_of(model),
        "tokenizer": tokenizer_fingerprints(tokenizer),
        "data": {name: [_told(source) for source in sources] for name, sources in said.items() if sources},
    }


def adapter_record(record: dict[str, Any]) -> dict[str, Any]:
    """The same for the adapter's own file: what made its numbers, and no names of this machine's directories.

    So the file is the same bytes wherever it was trained, and can be given away. Its base's name is PEFT's to say, in
    adapter_config.json.
    """
    told = [
        {**data, "path": None if data["sha256"] else data["path"], "sha256": list(data["sha256"].values())}
        for data in record["data"]["dataset"]
    ]
    base = {"weights_sha256": record["base_model"]["weights_sha256"]}
    return {**record, "base_model": base, "data": {"dataset": told}}


def write_run_file(
    directory: Path,
    config: FinetuneConfig,
    record: dict[str, Any],
    recomputation: dict[str, Any],
    result: dict[str, Any] | None,
) -> None:
    """Write `run.json`; `result` is there once the run is done."""
    write_json(
        directory / RUN_FILE,
        {
            **record,
            "machine": {"processor": platform.machine(), "kernels": active_implementation()},
            "config": config.to_dict(),
            "recomputation": recomputation,
            "result": result,
        },
    )


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """How a model's layers are in 4 bits, in the configuration's words; a checkpoint's own, whatever was asked for."""
    layer = next((module for module in model.modules() if isinstance(module, Linear4bit)), None)
    if layer is None:
        dtype = next(parameter.dtype for parameter in model.parameters())
        values: tuple[Any, ...] = ("none", 64, True, dtype)
    else:
        values = layer.quant_type, layer.block_size, layer.double_quant, layer.compute_dtype
    return dict(zip(QUANTIZATION_KEYS, (*values[:3], str(values[3]).removeprefix("torch.")), strict=True))


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
    """Where a saved adapter came from, as far as it says; empty for an adapter of another program's."""

    base_name: str | None = None
    base_sha256: str | None = None
    quantization: dict[str, Any] | None = None  # quant_type, block_size, double_quant, compute_dtype
    tokenizer: dict[str, str | None] | None = None
    record: dict[str, Any] | None = None  # what `make_record` made; without paths where the adapter alone tells it
    result: dict[str, Any] | None = None  # of the run, where its run.json is there


def read_origin(adapter: Path) -> Origin:
    """From an adapter's own file, which says it wherever it is copied to, and the `run.json` beside it or above it."""
    own, run = read_record(adapter), _read_run(adapter)
    is_same = own is None or run is None or own["base_model"].items() <= run["base_model"].items()
    record = run if run is not None and is_same else own
    if record is None:
        return Origin()
    return Origin(
        base_name=record["base_model"].get("name_or_path") or _base_by_peft(adapter),
        base_sha256=record["base_model"]["weights_sha256"],
        quantization={key: record["quantization"][key] for key in QUANTIZATION_KEYS},
        tokenizer=record.get("tokenizer"),
        record=record,
        result=record.get("result"),
    )


def _base_by_peft(adapter: Path) -> str | None:
    try:
        name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _read_run(adapter: Path) -> dict[str, Any] | None:
    """The `run.json` of an adapter; of a checkpoint's, the one above it."""
    for directory in (adapter, adapter.parent if adapter.name.startswith("checkpoint-") else adapter):
        try:
            run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
            # Runs of before quantization was told had it in their configuration alone.
            run.setdefault("quantization", {key: run["config"][key] for key in QUANTIZATION_KEYS})
            if is_record(run):
                return dict(run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had."""
    try:  # not ru_maxrss where it can be helped: a child inherits its parent's
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
