"""Where a model's files are, what its configuration says, and its tensors, none of them read yet.

A model is a local directory with `config.json` and safetensors (one file or shards), a `.gguf` file, or a
hub id, which becomes a local directory by download. Everything that can be wrong with the files is found
here, before any model is built.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from halfbyte.errors import HalfbyteError

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_WEIGHTS = ["*.safetensors"]


@dataclass(frozen=True)
class Source:
    """A model's files on this machine."""

    name: str  # as the user wrote it
    directory: Path
    gguf_file: Path | None = None

    @property
    def path(self) -> Path:
        return self.gguf_file or self.directory


def locate(model_name_or_path: str, with_weights: bool = True) -> Source:
    """Find a model, downloading it if it is a hub id; without its weights where those are not wanted.

    Raises:
        HalfbyteError: there is no such file or directory and no such model on the hub, or it holds no model.
    """
    path = Path(model_name_or_path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise HalfbyteError(f"{path} is a file but not a .gguf; name the model's directory instead.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise HalfbyteError(f"{path} is not a GGUF file, whatever its name says; fetch it again.")
        return Source(model_name_or_path, path.parent, path)
    if not path.is_dir():
        # A folder that is there, and a name in it that is not, is a slip of the pen and no hub id.
        is_hub_id = model_name_or_path.count("/") == 1 and not path.parent.is_dir()
        if path.is_absolute() or path.suffix == ".gguf" or not is_hub_id:
            raise HalfbyteError(f"There is no model at {path}; give a directory, a .gguf file or a hub id.")
        path = _download(model_name_or_path, with_weights)
    if not (path / "config.json").is_file():
        raise HalfbyteError(f"{path} holds no config.json, so it is not a model's directory.")
    return Source(model_name_or_path, path)


def _download(repository: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        unwanted = None if with_weights else _WEIGHTS
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=unwanted))
    except Exception as error:  # the hub's client raises many kinds; all mean that there is no model
        raise HalfbyteError(
            f"There is no directory {repository}, and the hub did not give a model of that name ({reason(error)})."
        ) from error


def read_config(source: Source) -> PreTrainedConfig:
    """The model's configuration, of an architecture that transformers knows as a causal language model.

    Raises:
        HalfbyteError: unreadable, of an unknown architecture, or not a causal language model's.
    """
    where = source.gguf_file or source.directory / "config.json"
    if not source.gguf_file:
        _check_config_file(where)
    try:
        if source.gguf_file:
            config = AutoConfig.from_pretrained(source.directory, gguf_file=source.gguf_file.name)
        else:
            # False, or transformers asks on the terminal whether to run the code that a model came with.
            config = AutoConfig.from_pretrained(source.directory, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own here
        raise HalfbyteError(f"{where} does not describe a model that transformers knows: {reason(error)}.") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HalfbyteError(f"{where}: model_type {config.model_type!r} is not a causal language model.")
    return config


def _check_config_file(file: Path) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HalfbyteError(f"{file} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise HalfbyteError(f"{file} names no model_type, so it is not a model's configuration.")


def reason(error: BaseException) -> str:
    """The first sentence of another library's error, on one line."""
    words = " ".join(str(error).split())
    return words.split(". ")[0].rstrip(".")[:300] or type(error).__name__


def read_safetensors(directory: Path) -> dict[str, Any]:
    """A directory's tensors by name, each read from disk when it is indexed with `[...]`, and not before.

    Raises:
        HalfbyteError: a shard is missing or truncated, or the weights are in a format that is not read.
    """
    tensors: dict[str, Any] = {}
    for file in safetensors_files(directory):
        try:
            # pread, not a memory map: pages of the file would count as this process's memory. (What is kept as it is
            # on disk, and not quantized, is mapped: mapped.py.)
            handle = safe_open(file, framework="pt", backend="pread")
            names = handle.keys()  # type: ignore[no-untyped-call]
            tensors.update({name: handle.get_slice(name) for name in names})  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(
                f"{file} is not a readable safetensors file ({error}); fetch or copy it again."
            ) from error
    return tensors


def safetensors_files(directory: Path) -> list[Path]:
    """The files of a directory's tensors.  Raises HalfbyteError where there are none, or one is missing."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise HalfbyteError(f"{index} is not a readable index of shards ({error}).") from error
        for name in names:
            if not (directory / name).is_file():
                raise HalfbyteError(f"{index} names the shard {name}, which is missing; fetch it again.")
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    if list(directory.glob("*.bin")):
        raise HalfbyteError(
            f"{directory} holds weights only as pickle (*.bin), which is not read; save them as safetensors."
        )
    raise HalfbyteError(f"{directory} holds no model.safetensors and no model.safetensors.index.json.")
