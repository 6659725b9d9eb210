"""An adapter in PEFT's own file format: adapter_config.json and adapter_model.safetensors."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter into a directory, each file aside and renamed.

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
        for name in ADAPTER_FILES:
            (Path(aside) / name).replace(directory / name)


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that they have on disk."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors
