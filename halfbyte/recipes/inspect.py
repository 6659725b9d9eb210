"""What a directory or a file holds, in words: what it is, what it came from, and what it fits.

Only headers and JSON are read, so a model of any size takes a moment. A directory can be several things: a run is an
adapter with its history, a merge is a model with one.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.integrations.gguf.reader import read_gguf_metadata

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.gguf import read_header
from halfbyte.huggingface.peft import read_adapter_config
from halfbyte.huggingface.safetensors_files import safetensors_files
from halfbyte.huggingface.source import reason
from halfbyte.quant import QUANT_STATE_PREFIX
from halfbyte.recipes.export import RECORD_KEY
from halfbyte.recipes.merge_job import MERGE_FILE
from halfbyte.recipes.provenance import read_origin

_SHORT = 12  # digits of a SHA-256 that a person compares


@dataclass(frozen=True)
class Description:
    """What is there, a sentence each, and the same as values."""

    path: str
    kind: str  # adapter, checkpoint, model, merge, gguf, tensors
    holds: list[str]
    from_: list[str] = field(default_factory=list)
    fits: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {"from" if key == "from_" else key: value for key, value in values.items()}


def inspect(path: str) -> Description:
    """Say what a directory, a .safetensors file or a .gguf file is.

    Raises:
        HalfbyteError: nothing is there, or nothing that is known, or it cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise HalfbyteError(f"There is nothing at {path}; name a directory, a .safetensors or a .gguf file.")
    if place.is_file():
        readers: dict[str, Callable[[Path], Description]] = {".gguf": _gguf, ".safetensors": _tensors}
        if place.suffix not in readers:
            raise HalfbyteError(f"{path} is neither a .safetensors nor a .gguf file, which alone are looked into.")
        return readers[place.suffix](place)
    if (place / "adapter_config.json").is_file():
        return _adapter(place)
    if (place / "config.json").is_file():
        return _model(place)
    raise HalfbyteError(f"{path} holds neither a model (config.json) nor an adapter (adapter_config.json).")


def _adapter(directory: Path) -> Description:
    config = read_adapter_config(directory)
    shapes, _ = _headers([directory / "adapter_model.safetensors"])
    values = sum(prod(shape) for shape in shapes.values())
    layers = {name.partition(".lora_")[0] for name in shapes if ".lora_" in name}
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    more = {"DoRA": config.use_dora, "rsLoRA": config.use_rslora, "biases of its own": config.lora_bias}
    extra = "".join(f", {name}" for name, there in more.items() if there)
    holds = [
        f"A LoRA adapter of rank {config.r}, alpha {config.lora_alpha}{extra}: {values:,} values on {len(layers)}"
        f" layers ({', '.join(kinds)})."
    ]
    if config.modules_to_save:
        holds.append(f"It also holds {', '.join(config.modules_to_save)} as a whole.")
    if config.trainable_token_indices:
        holds.append("It also holds trained tokens of the embedding.")
    origin = read_origin(directory)
    record, result = origin.record or {}, origin.result
    base = origin.base_name or config.base_model_name_or_path
    from_ = []
    if record:
        from_.append(_said_by(record, "Trained"))
        from_ += [f"On {_data(name, said)}." for name, said in (record.get("data") or {}).items()]
    if result:
        from_.append(f"{result['steps']} of {result['total_steps']} steps; the last loss was {result['loss']:.4f}.")
    fits = []
    if base:
        fits.append(f"It was trained on {base}{_in_4_bits(origin.quantization)}.")
    if origin.base_sha256:
        fits.append(
            f"It fits weights whose SHA-256 in 4 bits is {origin.base_sha256[:_SHORT]}…; where they are others,"
            " generate, evaluate and merge say so."
        )
    else:
        fits.append(
            "It does not say of what weights: that names and shapes fit is checked, and not that they are the same."
        )
    is_checkpoint = (directory / "state.json").is_file()
    if is_checkpoint:
        holds.append("A run can be resumed from it: the optimizer's state is there.")
    facts = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "values": values,
        "layers": sorted(layers),
        "base_model": base,
        "base_sha256": origin.base_sha256,
        "quantization": origin.quantization,
        "tokenizer": origin.tokenizer,
        "data": record.get("data"),
        "versions": record.get("versions"),
    }
    return Description(str(directory), "checkpoint" if is_checkpoint else "adapter", holds, from_, fits, facts)


def _model(directory: Path) -> Description:
    config = _json(directory / "config.json")
    files = safetensors_files(directory)
    shapes, dtypes = _headers(files)
    codes = {name for name in shapes if f"{name}.quant_map" in shapes}
    constants = {name for name in shapes if any(name.startswith(f"{weight}.") for weight in codes)}
    quantized = sum(2 * prod(shapes[name]) for name in codes)
    others = sum(prod(shape) for name, shape in shapes.items() if name not in codes | constants)
    types = Counter(dtypes[name] for name in shapes if name not in codes | constants)
    kind = ", ".join(sorted(types))
    size = sum(file.stat().st_size for file in files)
    count = "one file" if len(files) == 1 else f"{len(files)} files"
    holds = [
        f"A {config.get('model_type')} model of {quantized + others:,} parameters in {count}, {size / 1e9:.2f} GB."
    ]
    if codes:
        states = {name.rpartition(QUANT_STATE_PREFIX)[2] for name in constants if QUANT_STATE_PREFIX in name}
        holds.append(f"{quantized:,} of them are in 4 bits ({', '.join(sorted(states))}), the rest is in {kind}.")
    else:
        holds.append(f"Its tensors are in {kind}.")
    holds.append(
        "A chat template is there." if _has_template(directory) else "There is no chat template: it goes on with text."
    )
    facts = {
        "model_type": config.get("model_type"),
        "parameters": quantized + others,
        "bytes": size,
        "in_4_bits": quantized,
    }
    fits = ["transformers loads it, and halfbyte."]
    merged = directory / MERGE_FILE
    if not merged.is_file():
        return Description(str(directory), "model", holds, [], fits, facts)
    record = _json(merged)
    from_ = _told_of_merge(record)
    return Description(str(directory), "merge", holds, from_, fits, facts | {"merge": record})


def _told_of_merge(record: dict[str, Any]) -> list[str]:
    from_ = [_said_by(record, "Merged")]
    base = record.get("base_model") or {}
    told: dict[Any, str] = {True: "the base of the training", False: "which is not the base of the training"}
    known = told.get(base.get("verified"), "which is not known to be the base of the training")
    from_.append(f"From {base.get('name_or_path')}, {known}, its {record.get('onto')} weights.")
    from_ += [
        f"With the adapter {adapter['path']} (SHA-256 {adapter['sha256'][:_SHORT]}…), times {adapter['weight']:g}."
        for adapter in record.get("adapters", [])
    ]
    audit = record.get("audit")
    if audit:
        from_.append(f"Audited on {audit['tokens']:,} tokens: {audit['verdict']}")
    return from_


def _tensors(file: Path) -> Description:
    shapes, dtypes = _headers([file])
    kinds = Counter(dtypes.values())
    values = sum(prod(shape) for shape in shapes.values())
    told = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    holds = [f"{len(shapes)} tensors of {values:,} values: {told}."]
    if any("lora_" in name for name in shapes):
        holds.append("They are an adapter's.")
    return Description(str(file), "tensors", holds, [], [], {"tensors": len(shapes), "values": values})


def _gguf(file: Path) -> Description:
    header = read_header(file)
    kinds = Counter(_ggml_name(info.ggml_type) for info in header.tensors)
    values = sum(prod(info.shape) for info in header.tensors)
    told = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    metadata, _ = read_gguf_metadata(str(file))
    is_adapter = metadata.get("general.type") == "adapter"
    what = f"A LoRA adapter for a {header.architecture}" if is_adapter else f"A {header.architecture} model"
    holds = [
        f"{what} in GGUF: {values:,} parameters in {len(header.tensors)} tensors ({told}),"
        f" {file.stat().st_size / 1e9:.2f} GB."
    ]
    facts = {"architecture": header.architecture, "parameters": values, "tensors": dict(kinds)}
    if is_adapter:
        return Description(str(file), "gguf", holds, [], ["llama.cpp loads it beside the file of its base."], facts)
    record = json.loads(metadata.get(RECORD_KEY, "{}"))
    from_ = _told_of_merge(record) if record.get("adapters") else []
    fits = ["llama.cpp runs it; halfbyte trains on it and merges onto it."]
    return Description(str(file), "gguf", holds, from_, fits, facts | ({"merge": record} if record else {}))


def _ggml_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)


def _headers(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and dtypes of all tensors of some files, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", backend="pread") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_slice(name)
                    shapes[name], dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(f"{file} is not a readable safetensors file ({reason(error)}).") from error
    return shapes, dtypes


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HalfbyteError(f"{file} cannot be read as JSON ({reason(error)}).") from error
    if not isinstance(value, dict):
        raise HalfbyteError(f"{file} is not a JSON object.")
    return value


def _said_by(record: dict[str, Any], beginning: str) -> str:
    versions = record.get("versions") or {}
    told = ", ".join(f"{name} {versions[name]}" for name in ("halfbyte", "torch", "transformers") if name in versions)
    return f"{beginning} with {told}."


def _data(name: str, said: Any) -> str:
    """The sets that rows came from; runs of before there could be several say one, with one SHA-256.

    A run has the SHA-256 of each file, and an adapter by itself has them without names.
    """
    told = []
    for data in said if isinstance(said, list) else [said]:
        sums = data["sha256"]
        sums = list(sums.values()) if isinstance(sums, dict) else sums if isinstance(sums, list) else [sums]
        short = ", ".join(f"{sha256[:_SHORT]}…" for sha256 in sums)
        told.append(f"{data['path'] or 'a file'} (SHA-256 {short})" if short else str(data["path"]))
    what = "the rows of" if name == "dataset" else "held-out rows of"
    return f"{what} {', '.join(told)}"


def _in_4_bits(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return ""
    if quantization["quant_type"] == "none":
        return ", in 16 bits"
    nested = ", double-quantized" if quantization["double_quant"] else ""
    return f", in {quantization['quant_type']} with blocks of {quantization['block_size']}{nested}"


def _has_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    file = directory / "tokenizer_config.json"
    return file.is_file() and "chat_template" in _json(file)
