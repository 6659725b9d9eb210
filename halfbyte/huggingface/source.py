"""Where a model's files are, and what its configuration says.

A model is a local directory with `config.json` and safetensors (one file or shards), a `.gguf` file, or a
hub id, which becomes a local directory by download. Everything that can be wrong with the files is found
here, before any model is built.
"""

import json
from dataclasses import dataclass
from pathlib import Path

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
