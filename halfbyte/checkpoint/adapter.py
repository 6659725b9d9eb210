"""An adapter in PEFT's own file format: adapter_config.json and adapter_model.safetensors.

What it was trained from is in the header of the tensors' file, under `halfbyte` of its metadata, as JSON: it goes
wherever the file goes, and whoever reads tensors alone, as PEFT does, passes over it.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
QUANTIZATION_KEYS = ("quant_type", "block_size", "double_quant", "compute_dtype")
_KEY = "halfbyte"


def save_adapter(model: PeftModel, directory: Path, record: dict[str, Any] | None = None) -> None:
    """Write the adapter into a directory, each file aside and renamed.

    Args:
        record: what it was trained from (halfbyte.recipes.provenance), for the file's metadata.

    Raises:
        RuntimeError: the adapter has no tensors, or one that is not finite: such a file is never written.
    """
    tensors = adapter_tensors(model)
    if not tensors:
        raise RuntimeError("the adapter is empty: no LoRA tensor would be saved")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RuntimeError(f"the adapter is not finite: {broken[0]}")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as aside:
        # Embeddings are never trained here, and finding that out would ask the hub for the base's vocabulary.
        model.save_pretrained(aside, save_embedding_layers=False)
        if record is not None:
            _add_metadata(Path(aside) / ADAPTER_FILES[0], _KEY, json.dumps(record, ensure_ascii=False))
        for name in ADAPTER_FILES:
            (Path(aside) / name).replace(directory / name)


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that they have on disk."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def _add_metadata(file: Path, key: str, text: str) -> None:
    """Write a safetensors file anew with more metadata; not with safetensors, which has the keys in a random order."""
    aside = file.with_name(file.name + ".told")
    with file.open("rb") as source, aside.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header = {"__metadata__": {**header.get("__metadata__", {}), key: text}} | {
            name: entry for name, entry in header.items() if name != "__metadata__"
        }
        written = json.dumps(header, ensure_ascii=False).encode()
        written += b" " * (-len(written) % 8)  # as safetensors has it, so that tensors are aligned
        target.write(len(written).to_bytes(8, "little") + written)
        shutil.copyfileobj(source, target)
    aside.replace(file)


def read_record(directory: Path) -> dict[str, Any] | None:
    """What a saved adapter says of what it was trained from; None where it says nothing that can be read."""
    try:
        with safe_open(directory / ADAPTER_FILES[0], framework="pt", backend="pread") as file:
            record = json.loads((file.metadata() or {})[_KEY])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if is_record(record) else None


def is_record(value: Any) -> bool:
    """Whether it has what is read of it."""
    parts = {"base_model": ("weights_sha256",), "quantization": QUANTIZATION_KEYS}
    return isinstance(value, dict) and all(
        isinstance(value.get(part), dict) and all(key in value[part] for key in keys) for part, keys in parts.items()
    )
