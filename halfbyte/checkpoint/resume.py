"""Checkpoints from which a run goes on to the bits that it would have had undisturbed.

    checkpoint-N/
      adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
      optimizer.safetensors                             exp_avg.NAME, exp_avg_sq.NAME (float32); of 8-bit state codes
                                                        (uint8), and exp_avg_absmax.NAME, exp_avg_sq_absmax.NAME
      random.safetensors                                torch's generator states: cpu, cuda.0, …
      state.json                                        step, position in the data, settings, fingerprints

The schedule is a function of the step and the order of the data one of the seed and the epoch, so neither
has state of its own. A checkpoint is written aside and renamed: it is there whole or not at all.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.adapter import adapter_tensors, save_adapter
from halfbyte.checkpoint.files import directory_written_aside, write_json
from halfbyte.errors import HalfbyteError
from halfbyte.optim import AdamW

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    run_directory: Path,
    step: int,
    model: PeftModel,
    optimizer: AdamW,
    state: dict[str, Any],
    keep: int | None,
    record: dict[str, Any] | None = None,
) -> Path:
    """Write `checkpoint-STEP`, then remove the oldest beyond `keep`.  `state` is the caller's, JSON-able,
    and `record` what `save_adapter` takes.

    Checkpoints of later steps, from before a resumption at an earlier one, are left until they are written again.
    """
    directory = run_directory / f"checkpoint-{step}"
    with directory_written_aside(directory) as aside:
        save_adapter(model, aside, record)
        save_file(_optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
        save_file(_random_states(), aside / "random.safetensors")
        write_json(aside / "state.json", {"step": step, **state})
    if keep is not None:
        past = list_checkpoints(run_directory)
        for old in past[: past.index(directory) + 1][:-keep]:
            shutil.rmtree(old)
    return directory


def list_checkpoints(run_directory: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [
        (int(match[1]), path) for path in run_directory.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(run_directory: Path, resume_from: bool | str) -> Path:
    """The checkpoint that `resume_from_checkpoint` names: `True` is the latest of the run.

    Raises:
        HalfbyteError: there is none.
    """
    if resume_from is True:
        checkpoints = list_checkpoints(run_directory)
        if not checkpoints:
            raise HalfbyteError(f"{run_directory} holds no checkpoint-N to resume from; run it again from the start.")
        return checkpoints[-1]
    directory = Path(str(resume_from))
    if not (directory / "state.json").is_file():
        raise HalfbyteError(f"resume_from_checkpoint: {directory} is not a checkpoint of halfbyte's.")
    return directory


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON that `save_checkpoint` was given, and `step`.  Raises HalfbyteError if it cannot be read."""
    file = checkpoint / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HalfbyteError(f"{file} cannot be read ({error}); resume from another checkpoint.") from error
    if not (isinstance(state, dict) and type(state.get("step")) is int and isinstance(state.get("config"), dict)):
        raise HalfbyteError(f"{file} is not the state of a run of halfbyte's; resume from another checkpoint.")
    return state


def restore_checkpoint(checkpoint: Path, model: PeftModel, optimizer: AdamW) -> None:
    """Set the adapter, the optimizer's state and the random states to the checkpoint's.

    Raises:
        HalfbyteError: a file is missing or broken, or does not fit the model; then nothing was set.
    """
    step = read_state(checkpoint)["step"]
    trainable = _trainable(model)
    layouts = {name: optimizer.state_layout(parameter) for name, parameter in trainable}
    moments = {f"{key}.{name}": like for name, layout in layouts.items() for key, like in layout.items()}
    adapter = _load(checkpoint / "adapter_model.safetensors", adapter_tensors(model))
    saved = _load(checkpoint / "optimizer.safetensors", moments)
    random = _load(checkpoint / "random.safetensors", _random_states())
    set_peft_model_state_dict(model, adapter)
    for name, parameter in trainable:
        optimizer.set_state(parameter, step, {key: saved[f"{key}.{name}"] for key in layouts[name]})
    torch.set_rng_state(random["cpu"])
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_rng_state(random[f"cuda.{index}"], index)


def _trainable(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _optimizer_tensors(model: PeftModel, optimizer: AdamW) -> dict[str, torch.Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in _trainable(model)
        for key, value in optimizer.state[parameter].items()
        if key != "step"
    }


def _random_states() -> dict[str, torch.Tensor]:
    states = {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state(), **states}


def _load(file: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors, which are those expected, in shape and dtype."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise HalfbyteError(f"{file} cannot be read ({error}); resume from another checkpoint.") from error
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise HalfbyteError(f"{file} does not fit this run: {name} is in one of them only.")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise HalfbyteError(f"{file} does not fit this run: {name} is {tuple(tensor.shape)} of {tensor.dtype}.")
    return tensors
