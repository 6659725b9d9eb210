"""Checkpoints: everything a run needs to go on, and one sentence for one that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte import HalfbyteError, add_lora, load_model
from halfbyte.checkpoint import resume
from halfbyte.checkpoint.adapter import adapter_tensors
from halfbyte.checkpoint.resume import (
    find_checkpoint,
    list_checkpoints,
    read_state,
    restore_checkpoint,
    save_checkpoint,
)
from halfbyte.optim import AdamW

pytestmark = pytest.mark.filterwarnings("ignore:page_dir")  # where tests write may be memory

Training = tuple[PeftModel, AdamW]
INPUT_IDS = torch.arange(12).view(1, 12)
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")


@pytest.fixture
def build(model_directory: Callable[[str], Path]) -> Callable[..., Training]:
    def new(r: int = 4, **state: Any) -> Training:
        base, _ = load_model(str(model_directory("llama")), compute_dtype=torch.float32, fast=False)
        settings = LoraConfig(r=r, target_modules=["q_proj", "up_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
        model = add_lora(base, settings).train()
        return model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **state)

    return new


def train(model: PeftModel, optimizer: AdamW, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def save(directory: Path, step: int, training: Training, keep: int | None = None) -> Path:
    return save_checkpoint(directory, step, *training, {"config": {"seed": 1}}, keep)


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_a_restored_training_goes_on_to_the_same_bits(build: Callable[[], Training], tmp_path: Path) -> None:
    first = build()
    train(*first, 3)
    checkpoint = save(tmp_path, 3, first)
    expected_losses = train(*first, 3)
    other = build()
    torch.manual_seed(99)
    train(*other, 1)  # a state to be forgotten
    restore_checkpoint(checkpoint, *other)
    assert train(*other, 3) == expected_losses  # dropout's draws too
    for mine, theirs in zip(adapter_tensors(first[0]).values(), adapter_tensors(other[0]).values(), strict=True):
        assert torch.equal(mine, theirs)
    assert {state["step"] for state in other[1].state.values()} == {6}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("paged", [False, True])
def test_8_bits_and_pages_go_on_to_the_same_bits(
    build: Callable[..., Training], tmp_path: Path, bits: int, paged: bool
) -> None:
    """A checkpoint of a paged optimizer is gone on from in memory, and the other way round."""
    first = build(r=128, state_bits=bits, paged=paged)  # so wide that some adapters have 4,096 values
    train(*first, 3)
    checkpoint = save(tmp_path, 3, first)
    dtypes = [tensor.dtype for tensor in load_file(checkpoint / "optimizer.safetensors").values()]
    assert (torch.uint8 in dtypes) == (bits == 8)
    assert torch.float32 in dtypes
    expected_losses = train(*first, 3)
    other = build(r=128, state_bits=bits, paged=not paged)
    restore_checkpoint(checkpoint, *other)
    assert train(*other, 3) == expected_losses
    again = save(tmp_path, 6, other)
    save(tmp_path, 7, first)
    assert (again / FILES[1]).read_bytes() == (tmp_path / "checkpoint-7" / FILES[1]).read_bytes()
    wrong = build(r=128, state_bits=40 - bits)
    with pytest.raises(HalfbyteError, match=r"optimizer\.safetensors does not fit"):
        restore_checkpoint(checkpoint, *wrong)


def test_there_is_no_pickle_in_it(build: Callable[[], Training], tmp_path: Path) -> None:
    training = build()
    train(*training, 1)
    checkpoint = save(tmp_path, 1, training)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*FILES, "adapter_config.json"])
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert len(moments) == 2 * 8
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
    assert json.loads((checkpoint / "state.json").read_text()) == {"step": 1, "config": {"seed": 1}}


def test_the_newest_are_kept(build: Callable[[], Training], tmp_path: Path) -> None:
    training = build()
    train(*training, 1)
    for step in (2, 4, 10, 9):
        save(tmp_path, step, training, keep=2)
    # 9 was written after a resumption from 4: of what is up to it two remain, and 10 stays until it is written again.
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-9", "checkpoint-10"]
    save(tmp_path, 10, training, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    save(tmp_path, 11, training)
    assert len(list_checkpoints(tmp_path)) == 3


def test_which_one_is_found(tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="no checkpoint-N"):
        find_checkpoint(tmp_path, True)
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-9", "checkpoint-99.writing", "checkpoint-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text('{"step": 1, "config": {}}')
    assert find_checkpoint(tmp_path, True).name == "checkpoint-10"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2")).name == "checkpoint-2"
    with pytest.raises(HalfbyteError, match="not a checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path))


@pytest.mark.parametrize("left", ["checkpoint-6.writing", "checkpoint-6.replaced"])
def test_what_a_kill_left_is_not_taken_and_is_cleared(build: Callable[[], Training], tmp_path: Path, left: str) -> None:
    training = build()
    train(*training, 1)
    save(tmp_path, 4, training)
    (tmp_path / left).mkdir()
    (tmp_path / left / "adapter_model.safetensors").write_bytes(b"half of it")
    assert find_checkpoint(tmp_path, True).name == "checkpoint-4"
    save(tmp_path, 6, training)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("failing", ["save_adapter", "save_file", "write_json"])
def test_a_disk_that_fills_up_costs_nothing_that_was_there(
    build: Callable[[], Training], tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = build()
    train(*training, 1)
    save(tmp_path, 2, training, keep=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 4, training, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before


def first_of(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_broken_file_is_named_and_nothing_is_set(
    build: Callable[[], Training], tmp_path: Path, name: str, damage: str
) -> None:
    training = build()
    train(*training, 1)
    checkpoint = save(tmp_path, 1, training)
    file = checkpoint / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    other = build()
    before = {key: tensor.clone() for key, tensor in adapter_tensors(other[0]).items()}
    random_state = torch.get_rng_state()
    with pytest.raises(HalfbyteError, match=name):
        restore_checkpoint(checkpoint, *other)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_tensors(other[0]).items())
    assert len(other[1].state) == 0
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(first_of(tensors)),
        lambda tensors: tensors.update(more=torch.zeros(1)),
        lambda tensors: tensors.update({first_of(tensors): tensors[first_of(tensors)][:-1].clone()}),
        lambda tensors: tensors.update({first_of(tensors): tensors[first_of(tensors)].half()}),
    ],
    ids=["missing", "more", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_refused(
    build: Callable[[], Training], tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], Any]
) -> None:
    training = build()
    train(*training, 1)
    checkpoint = save(tmp_path, 1, training)
    edit(checkpoint / name, change)
    with pytest.raises(HalfbyteError, match=name):
        restore_checkpoint(checkpoint, *build())


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"step": "4", "config": {}}', '{"step": true, "config": {}}', '{"step": 4}', "[" * 100_000],
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(HalfbyteError, match=r"state\.json"):
        read_state(tmp_path)
