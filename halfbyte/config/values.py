"""The kinds of value that a type and two bounds do not describe: paths, names, powers of two."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from halfbyte.config.words import Allowed

# What accelerate.tracking can send metrics to (docs/decisions/0006).
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


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


def _parts_of_text(value: object) -> object:
    """`runs/a, runs/b`, as typed on a command line, is a list; so is one of them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _numbers_of_text(value: object) -> object:
    return _parts_of_text(str(value) if isinstance(value, int | float) else value)


def memory_bytes(text: str) -> int:
    """`8GB` or `6.5 GiB` in bytes.  Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError("not a size")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(unit.upper())))
    if not size:
        raise ValueError("no memory at all")
    return size


def _memory_size(text: str) -> str:
    memory_bytes(text)
    return text


def _boolean_or_path(value: object) -> object:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


_NonEmpty = Field(min_length=1)
_Expanded = AfterValidator(_expand_home)

Text = Annotated[str, _NonEmpty, Allowed("text", "TEXT")]
PathText = Annotated[str, _NonEmpty, _Expanded, Allowed("a path", "PATH")]
ModelName = Annotated[str, _NonEmpty, _Expanded, Allowed("a model directory, a .gguf file or a hub id", "MODEL")]
Recomputation = Annotated[
    bool | Literal["auto"],
    BeforeValidator(_boolean_or_path),
    Allowed("auto, true or false", "[auto|true|false]"),
]
MemorySize = Annotated[str, AfterValidator(_memory_size), Allowed("a size such as 8GB or 6.5GiB", "SIZE")]
BlockSize = Annotated[
    int,
    Field(ge=32, le=4096),
    AfterValidator(_power_of_two),
    Allowed("a power of two from 32 to 4096", "INTEGER"),
]
MaxSteps = Annotated[
    int,
    Field(ge=-1),
    AfterValidator(_positive_or_minus_one),
    Allowed("a whole number of at least 1, or -1 to go by num_train_epochs", "INTEGER"),
]
TargetModules = Annotated[
    str | list[str],
    _NonEmpty,
    BeforeValidator(_names_from_text),
    AfterValidator(_names_or_pattern),
    Allowed("all-linear, a list of module names or a regular expression", "NAMES"),
]
ResumePoint = Annotated[
    bool | str,
    BeforeValidator(_boolean_or_path),
    Allowed("true for the latest in output_dir, false, or the path of a checkpoint", "[true|false|PATH]"),
]
PathList = Annotated[
    list[Annotated[str, _NonEmpty, _Expanded]],
    _NonEmpty,
    BeforeValidator(_parts_of_text),
    Allowed("a path, or several with commas between them", "PATHS"),
]
NumberList = Annotated[
    list[float],
    _NonEmpty,
    BeforeValidator(_numbers_of_text),
    Allowed("a number, or several with commas between them", "NUMBERS"),
]
Trackers = Annotated[
    list[Annotated[str, AfterValidator(_known_tracker)]],
    BeforeValidator(_trackers_from_text),
    Allowed("none, or names from " + ", ".join(TRACKERS), "NAMES"),
]
