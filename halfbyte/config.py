"""Typed configuration: which keys there are, what each may hold, and one sentence for everything else.

Keys are flat and carry the names people already type (transformers, TRL, PEFT). A configuration is
made of sections: `FinetuneConfig` and `EvaluateConfig` share `QuantizationKeys`, so a key means the same
thing in each. The descriptions below are the `--help` text of the command line and the tables of
docs/configuration.md; there is no second list.

`load_config` merges a YAML file with flags, and turns whatever is wrong with either into one `HalfbyteError`
that names the file and line (or the flag), the key, the value that was found and what is allowed.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from halfbyte.errors import HalfbyteError

# What accelerate.tracking can send metrics to (docs/decisions/0006).
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")

# ── What a value may be ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Allowed:
    """The words for what a field accepts, where its type and bounds do not say it well enough."""

    text: str
    metavar: str  # what `--help` shows in the place of the value


def _expand_home(path: str) -> str:
    # A shell expands `~` in `--output_dir ~/runs`, but not in `--output_dir=~/runs`, and YAML never does.
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _power_of_two(number: int) -> int:
    if number & (number - 1):
        raise ValueError("not a power of two")
    return number


def _positive_or_minus_one(number: int) -> int:
    if number == 0:
        raise ValueError("zero steps")
    return number


def _names_from_text(value: object) -> object:
    """`q_proj, v_proj`, as typed on a command line, is a list; other text may be a pattern and stays."""
    if isinstance(value, str) and "," in value:
        names = [name.strip() for name in value.split(",")]
        if all(name.replace(".", "").replace("_", "").isalnum() for name in names):
            return names
    return value


def _names_or_pattern(value: str | list[str]) -> str | list[str]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError("not a regular expression") from error
    return value


def _trackers_from_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    return [] if value.strip().lower() == "none" else [name.strip() for name in value.split(",")]


def _known_tracker(name: str) -> str:
    if name not in TRACKERS:
        raise ValueError("not a tracker")
    return name


def _boolean_or_path(value: object) -> object:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


_NonEmpty = Field(min_length=1)
PathText = Annotated[str, _NonEmpty, AfterValidator(_expand_home), Allowed("a path", "PATH")]
ModelName = Annotated[
    str,
    _NonEmpty,
    AfterValidator(_expand_home),
    Allowed("a model directory, a .gguf file or a hub id", "MODEL"),
]
DataPath = Annotated[str, _NonEmpty, AfterValidator(_expand_home), Allowed("the path of a data file", "PATH")]
Trackers = Annotated[
    list[Annotated[str, AfterValidator(_known_tracker)]],
    BeforeValidator(_trackers_from_text),
    Allowed("none, or names from " + ", ".join(TRACKERS), "NAMES"),
]


# ── The sections ────────────────────────────────────────────────────────────────────────────────────────────


class Config(BaseModel):
    """What every configuration has in common: no unknown keys, no changes once it is made, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # Python's True is 1, so `seed: yes` would quietly be 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and bool not in alternatives(field.annotation):
            raise ValueError("a boolean where none is allowed")
        return value

    @classmethod
    def sections(cls) -> dict[str, list[str]]:
        """Title -> keys, in the order a person reads them; the titles are the sections' docstrings."""
        bases = [base for base in cls.__bases__ if issubclass(base, Config)]
        return {(base.__doc__ or "").strip(): list(base.model_fields) for base in bases}

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, JSON-able; `load_config(cls, None, config.to_dict())` gives it back."""
        values = self.model_dump(mode="json")
        return {key: values[key] for keys in type(self).sections().values() for key in keys}


class ModelKeys(Config):
    """Model"""

    model_name_or_path: ModelName = Field(description="A model directory, a .gguf file or a hub id.")


class DataKeys(Config):
    """Data"""

    dataset: DataPath = Field(description="The rows to learn from or to look at: .jsonl or .json.")
    dataset_format: Literal["auto", "alpaca", "messages"] = Field(
        "auto", description="What a row looks like; auto looks at the first row."
    )
    max_length: int = Field(1024, ge=2, description="Longest row, in tokens; the beginning of a longer one is cut off.")


class QuantizationKeys(Config):
    """Quantization of the frozen base model"""

    quant_type: Literal["nf4", "fp4", "int4", "none"] = Field(
        "nf4", description="The 4-bit code of the base weights; none leaves them in compute_dtype."
    )
    block_size: Annotated[
        int,
        Field(ge=32, le=4096),
        AfterValidator(_power_of_two),
        Allowed("a power of two from 32 to 4096", "INTEGER"),
    ] = Field(64, description="Weights that share one scale, a power of two.")
    double_quant: bool = Field(True, description="Quantize the scales as well, to 8 bits.")
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="What activations and matrix products are computed in."
    )


class LoraKeys(Config):
    """Low-rank adapters"""

    lora_r: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(32, ge=1, description="The adapters are scaled by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the input of the adapters.")
    target_modules: Annotated[
        str | list[str],
        _NonEmpty,
        BeforeValidator(_names_from_text),
        AfterValidator(_names_or_pattern),
        Allowed("all-linear, a list of module names or a regular expression", "NAMES"),
    ] = Field("all-linear", description="Modules that get an adapter: all-linear, names or a pattern.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (arXiv 2312.03732).")


class BatchKeys(Config):
    """Batches"""

    per_device_train_batch_size: int = Field(4, ge=1, description="Rows in one forward and backward pass.")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Passes that make up one optimizer step.")
    packing: bool = Field(
        True, description="Put several rows of data into one of max_length tokens; none sees another."
    )
    train_on_source: bool = Field(False, description="Learn the prompts too, not only the answers.")


class HeldOutKeys(Config):
    """Held-out rows"""

    eval_dataset: DataPath | None = Field(None, description="Rows to measure the loss on, at the end at least.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between two such measurements.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Rows in one forward pass.")


class ScheduleKeys(Config):
    """Length and optimizer"""

    num_train_epochs: float = Field(1.0, gt=0, description="Times the data is gone through; 0.5 is half of it.")
    max_steps: Annotated[
        int,
        Field(ge=-1),
        AfterValidator(_positive_or_minus_one),
        Allowed("a whole number of at least 1, or -1 to go by num_train_epochs", "INTEGER"),
    ] = Field(-1, description="Optimizer steps in all; -1: as num_train_epochs says.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="What the learning rate does after warming up; linear and cosine end at zero."
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps in which the rate climbs.")
    optim: Literal["adamw"] = Field("adamw", description="The optimizer.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay of the adapters.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    max_grad_norm: float = Field(0.3, ge=0, description="Longer gradients are scaled down to this; 0: never.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )


class RunKeys(Config):
    """The run and what it leaves behind"""

    output_dir: PathText = Field(description="Where the adapter, the metrics and the checkpoints go.")
    overwrite_output_dir: bool = Field(False, description="Replace a finished run that is in output_dir.")
    resume_from_checkpoint: Annotated[
        bool | str,
        BeforeValidator(_boolean_or_path),
        Allowed("true for the latest in output_dir, false, or the path of a checkpoint", "[true|false|PATH]"),
    ] = Field(False, description="Go on from a checkpoint; true: the latest.")
    logging_steps: int = Field(1, ge=1, description="Steps between two lines of metrics.")
    save_steps: int | None = Field(None, ge=1, description="Steps between two checkpoints.")
    save_total_limit: int | None = Field(None, ge=1, description="Checkpoints to keep, the newest ones.")
    report_to: Trackers = Field(["tensorboard"], description="Trackers that get the metrics as well, or none.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Decides the order of rows, dropout and the first adapters.")
    threads: int | None = Field(None, ge=1, description="CPU threads, where torch's own choice is not wanted.")


class EvaluationKeys(Config):
    """Evaluation"""

    adapter: PathText | None = Field(None, description="The directory of a LoRA adapter to put on the model.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Rows in one forward pass.")
    limit: int | None = Field(None, ge=1, description="Look at the first so many rows only.")
    generate: bool = Field(True, description="Also answer every prompt greedily and count the exact matches.")
    max_new_tokens: int = Field(128, ge=1, description="Longest generated answer, in tokens.")
    output: PathText | None = Field(None, description="A JSON file to write the result to.")


class GenerationKeys(Config):
    """Generation"""

    prompt: Annotated[str, _NonEmpty, Allowed("text", "TEXT")] = Field(
        description="What the user says; - reads it from standard input."
    )
    system: str | None = Field(None, description="The system message.")
    adapter: PathText | None = Field(None, description="The directory of a LoRA adapter to put on the model.")
    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens up to this share.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Decides which tokens are drawn.")


class CheckpointKeys(Config):
    """Output"""

    output_dir: PathText = Field(description="Where the 4-bit checkpoint goes.")
    overwrite_output_dir: bool = Field(False, description="Replace a checkpoint that is in output_dir.")


# ── The configurations ──────────────────────────────────────────────────────────────────────────────────────


class FinetuneConfig(ModelKeys, DataKeys, QuantizationKeys, LoraKeys, BatchKeys, ScheduleKeys, HeldOutKeys, RunKeys):
    """What `halfbyte finetune` reads."""

    @model_validator(mode="after")
    def _keys_agree(self) -> "FinetuneConfig":
        epochs = self.num_train_epochs
        relations = [
            (
                "max_steps",
                self.max_steps < 0 or epochs == type(self).model_fields["num_train_epochs"].default,
                f"max_steps ({self.max_steps}) and num_train_epochs ({epochs:g}) both say how long to train: "
                "leave one of them out",
            ),
            (
                "eval_steps",
                self.eval_steps is None or self.eval_dataset is not None,
                "eval_steps is set but eval_dataset is not, so there is nothing to evaluate on",
            ),
            (
                "save_total_limit",
                self.save_total_limit is None or self.save_steps is not None,
                "save_total_limit is set but save_steps is not, so no checkpoint would be written",
            ),
            (
                "overwrite_output_dir",
                not (self.overwrite_output_dir and self.resume_from_checkpoint is True),
                "overwrite_output_dir would remove the checkpoint that resume_from_checkpoint goes on from: "
                "leave one of them out",
            ),
        ]
        for key, holds, sentence in relations:
            if not holds:
                raise PydanticCustomError("keys_disagree", "{sentence}", {"key": key, "sentence": sentence})
        return self


class EvaluateConfig(ModelKeys, DataKeys, QuantizationKeys, EvaluationKeys):
    """What `halfbyte evaluate` reads."""


class GenerateConfig(ModelKeys, GenerationKeys, QuantizationKeys):
    """What `halfbyte generate` reads."""


class QuantizeConfig(ModelKeys, QuantizationKeys, CheckpointKeys):
    """What `halfbyte quantize` reads."""


# ── The words for a field ───────────────────────────────────────────────────────────────────────────────────


def alternatives(annotation: Any) -> list[Any]:
    """`bool | str` -> [bool, str]; `int` -> [int]."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _bounds(metadata: list[Any]) -> str:
    # pydantic keeps `ge=1` as an object with an attribute `ge`.
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = {name: limit for name in words for item in metadata if (limit := getattr(item, name, None)) is not None}
    return " and ".join(f"{words[name]} {limit}" for name, limit in limits.items())


def allowed(field: FieldInfo) -> Allowed:
    """What a field accepts: `a number above 0 and at most 1`, `NUMBER`."""
    kinds = [kind for kind in alternatives(field.annotation) if kind is not NoneType]
    metadata = [*field.metadata]
    for kind in kinds:
        metadata.extend(getattr(kind, "__metadata__", ()))
    for item in metadata:
        if isinstance(item, Allowed):
            return item
    if get_origin(kinds[0]) is Literal:
        values = [str(value) for value in get_args(kinds[0])]
        return Allowed(_join(values), f"[{'|'.join(values)}]")
    if kinds[0] is bool:
        return Allowed("true or false", "[true|false]")
    noun, metavar = _NOUNS[kinds[0]]
    return Allowed(f"{noun} {_bounds(metadata)}".rstrip(), metavar)


_NOUNS = {int: ("a whole number", "INTEGER"), float: ("a number", "NUMBER"), str: ("text", "TEXT")}


# Names that other tools give the same thing; difflib would lead `lr` to `lora_r`.
_ELSEWHERE = {
    "model": "model_name_or_path",
    "data": "dataset",
    "train_file": "dataset",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "lr": "learning_rate",
    "r": "lora_r",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "scheduler": "lr_scheduler_type",
    "adapter_name_or_path": "adapter",
}


def nearest(name: str, known: list[str]) -> str | None:
    """The known name that was probably meant."""
    name = name.lower().replace("-", "_")
    elsewhere = _ELSEWHERE.get(name)
    if elsewhere in known:
        return elsewhere
    matches = difflib.get_close_matches(name, known, n=1)
    return matches[0] if matches else None


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], yaml_path: str | Path | None, overrides: Mapping[str, object]) -> ConfigT:
    """A YAML file merged with flags, which win; `HalfbyteError` names the one place where they are wrong."""
    values, lines = _read_yaml(Path(yaml_path)) if yaml_path is not None else ({}, {})
    if "num_train_epochs" in overrides and "max_steps" not in overrides:
        values.pop("max_steps", None)  # a flag beats the file, also where it is by its meaning
    if str(overrides.get("max_steps", "-1")) != "-1" and "num_train_epochs" not in overrides:
        values.pop("num_train_epochs", None)

    def place(key: str) -> str:
        if key in overrides or key not in values:
            return "--"
        return f"{yaml_path}:{lines[key]}: " if key in lines else f"{yaml_path}: "

    known = list(cls.model_fields)
    for key in (*values, *overrides):
        if key not in known:
            meant = nearest(key, known)
            where = place(key).removesuffix("--")
            advice = f"did you mean {meant}?" if meant else "docs/configuration.md lists the keys"
            raise HalfbyteError(f"{where}unknown key {_show(key)}: {advice}")
    try:
        return cls(**{**values, **overrides})
    except ValidationError as error:
        sentence = _sentence(cls, error, place, str(yaml_path) if yaml_path is not None else None)
    raise HalfbyteError(sentence)


def _sentence(cls: type[Config], error: ValidationError, place: Callable[[str], str], file: str | None) -> str:
    # What was written wrongly comes before what was not written; then in the order a person reads the keys.
    order = ["keys_disagree", *(key for keys in cls.sections().values() for key in keys)]
    first = min(
        error.errors(include_url=False),
        key=lambda detail: (detail["type"] == "missing", order.index(str((*detail["loc"], detail["type"])[0]))),
    )
    if first["type"] == "keys_disagree":
        return f"{place(first['ctx']['key']).removesuffix('--')}{first['ctx']['sentence']}"
    key = str(first["loc"][0])
    words = allowed(cls.model_fields[key]).text
    if first["type"] == "missing":
        ways = f"set it in {file} or give --{key}" if file else f"give --{key}, or a YAML file that sets it"
        return f"{key} is missing ({words}): {ways}"
    # YAML reads `output_dir: 2026-01-31` as a date and `dataset: 7` as a number.
    unquoted = first["type"] == "string_type" and isinstance(first["input"], int | float | date)
    quotes = " (in quotes)" if unquoted else ""
    return f"{place(key)}{key} is {_show(first['input'])}, but it must be {words}{quotes}"


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = str(value) if isinstance(value, date) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping of a YAML file, and the line each key is on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise HalfbyteError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise HalfbyteError(f"{path} is a directory, where a YAML file was expected") from None
    except UnicodeDecodeError as error:
        raise HalfbyteError(f"{path}: not UTF-8 text (byte {error.start}), so not a YAML file") from None
    except OSError as error:
        raise HalfbyteError(f"{path} cannot be read: {error.strerror}") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        lines = _key_lines(path, root)  # before construction, which rewrites the nodes of a `<<` merge
        values = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise HalfbyteError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # control characters; 2024-13-45, which YAML takes for a date
        raise HalfbyteError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise HalfbyteError(f"{path}: not valid YAML: nested too deeply") from None
    return {str(key): value for key, value in values.items()}, lines


def _key_lines(path: Path, root: yaml.Node | None) -> dict[str, int]:
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise HalfbyteError(f"{path}:{root.start_mark.line + 1}: expected lines of the form `key: value`")
    lines: dict[str, int] = {}
    for key_node, _ in root.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise HalfbyteError(f"{path}:{line}: {key} is set a second time; line {lines[key]} sets it too")
        lines[key] = line
    return lines
