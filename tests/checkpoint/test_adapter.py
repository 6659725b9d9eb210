"""An adapter on disk: whole, finite, in PEFT's format, or not there at all."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from halfbyte import add_lora, load_model
from halfbyte.checkpoint import adapter
from halfbyte.checkpoint.adapter import ADAPTER_FILES, adapter_tensors, save_adapter


@pytest.fixture
def model(model_directory: Callable[[str], Path]) -> PeftModel:
    base, _ = load_model(str(model_directory("llama")))
    return add_lora(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def test_what_is_written_are_two_files_with_every_tensor(model: PeftModel, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(ADAPTER_FILES)
    saved = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2
    assert all(name.startswith("base_model.model.model.layers.") for name in saved)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_an_empty_adapter_is_never_saved(model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(adapter, "get_peft_model_state_dict", lambda *_, **__: {})
    with pytest.raises(RuntimeError, match="empty"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_never_saved(model: PeftModel, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        next(iter(adapter_tensors(model).values()))[0, 0] = value
    with pytest.raises(RuntimeError, match="not finite"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_the_adapter_that_was_there(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: str, **_: object) -> None:
        (Path(path) / ADAPTER_FILES[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(1)
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
