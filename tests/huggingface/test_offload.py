"""Layers' inputs on disk are the same bits; in 8 bits they take half, and the gradients stay near."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from halfbyte import HalfbyteError, add_lora, load_model
from halfbyte.huggingface import offload
from halfbyte.huggingface.offload import offloaded
from halfbyte.huggingface.recompute import set_recomputation
from halfbyte.nn import supervised_loss
from models import VOCABULARY_SIZE

ROWS, LENGTH = 3, 40


@pytest.fixture
def adapted(model_directory: Callable[[str], Path]) -> nn.Module:
    torch.manual_seed(0)
    model, _ = load_model(str(model_directory("llama")))
    model = add_lora(model, LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    set_recomputation(model, "full")
    return model.train()


@pytest.fixture(autouse=True)
def _every_tensor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)


def gradients(model: nn.Module, kind: str, directory: Path | None = None) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY_SIZE - 3, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with offloaded(kind, directory):
        loss = supervised_loss(model, batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_on_disk_they_are_the_same_bits(adapted: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, files = gradients(adapted, "none"), []
    original = offload.PageFile

    def counted(*args: Any) -> Any:
        files.append(original(*args))
        return files[-1]

    monkeypatch.setattr(offload, "PageFile", counted)
    found = gradients(adapted, "disk", tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    layers, hidden = adapted.config.num_hidden_layers, adapted.config.hidden_size
    kept = [tensor for file in files for tensor in file.tensors[0].values()]
    assert len([tensor for tensor in kept if tensor.shape == (ROWS, LENGTH, hidden)]) >= layers
    assert not list(tmp_path.iterdir()), "the files have no names"


def test_in_8_bits_they_are_near(adapted: nn.Module) -> None:
    expected, found = gradients(adapted, "none"), gradients(adapted, "8bit")
    assert found.keys() == expected.keys()
    both = [torch.cat([g[name].flatten() for name in expected]) for g in (found, expected)]
    error = (both[0] - both[1]).norm() / both[1].norm()
    assert 0 < error < 0.05


def test_a_tensor_of_few_bytes_stays(adapted: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1 << 30)
    expected, found = gradients(adapted, "none"), gradients(adapted, "8bit")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1,), (255,), (257,), (3, 40, 64), (2, 0, 4)])
def test_what_comes_back(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    given = torch.randn(shape).to(dtype)
    kept = offload._to_pages(given, tmp_path)()
    assert kept.dtype == dtype
    assert torch.equal(kept, given)
    if given.numel():
        near = offload._to_8_bits(given)()
        assert (near.dtype, near.shape) == (dtype, given.shape)
        assert (near - given).abs().max() <= 0.02 * given.abs().max()


def test_a_directory_that_is_not_there(adapted: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match=r"page_dir .*missing is not a directory"):
        gradients(adapted, "disk", tmp_path / "missing")
