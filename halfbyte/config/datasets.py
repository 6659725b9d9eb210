"""What `dataset` may hold: a place where rows are, or several of them, each with settings of its own."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from halfbyte.config.values import PathText, Text
from halfbyte.config.words import Allowed

DatasetFormat = Literal[
    "auto",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt-completion",
    "self-instruct",
    "input-output",
    "hh-rlhf",
    "chip2",
    "oasst1",
    "text",
]


def _columns_from_text(value: object) -> object:
    """`instruction=question, output=answer`, as typed on a command line."""
    if isinstance(value, str):
        return dict(part.strip().split("=", 1) for part in value.split(",") if part.strip())
    return value


Columns = Annotated[
    dict[Text, Text],
    Field(min_length=1),
    BeforeValidator(_columns_from_text),
    Allowed("key=column, separated by commas, or a mapping", "KEY=COLUMN,..."),
]


class DatasetEntry(BaseModel):
    """One of several data sets. What it leaves out is as the key of that name says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: PathText
    weight: float | None = Field(None, gt=0)  # share of the mix; all sets have one, or none has
    split: str | None = Field(None, min_length=1)
    dataset_format: DatasetFormat | None = None
    columns: Columns | None = None  # key of the format -> column of the data


def _entries(value: object) -> object:
    return [value] if isinstance(value, dict) else value


DatasetPaths = Annotated[
    PathText | Annotated[list[PathText | DatasetEntry], Field(min_length=1)],
    BeforeValidator(_entries),
    Allowed(
        "a file, a directory, a hub id, or a list of {path, weight, split, dataset_format, columns}",
        "PATH",
    ),
]
