"""What a row is, whatever file it comes from: a conversation, a text laid out by its author, or both."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Alpaca(NamedTuple):
    instruction: str
    input: str  # "" when the row has none
    output: str


class Piece(NamedTuple):
    """A part of a text that is used word for word."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Row:
    """One text to learn from.

    `messages` is a conversation in OpenAI's form, for a chat template: `role` (system, developer, user, assistant or
    tool) and `content`, which is always text; where present `tool_calls` (`{"type": "function", "function": {"name",
    "arguments"}}`, the arguments an object), `name`, `tool_call_id` and `reasoning_content`. It has at least one
    assistant turn, never the first; [] where the row has no reading as a conversation.

    `source` is "file:line"; of a `.json` list "file:line (row n)"; of Parquet, Arrow and hub data "file (row n)", n
    from 1.

    `alpaca` holds the fields of an Alpaca row as they were written, for the Alpaca templates.

    `pieces` is a text laid out by its author: a BOS before and an EOS after it, as a base model has them, and nothing
    else. Where `messages` stand beside it, it is for tokenizers without a chat template.

    `tools` are OpenAI's tool schemas (`{"type": "function", "function": {...}}`), for the chat template.
    """

    messages: list[dict[str, Any]]
    source: str
    alpaca: Alpaca | None = None
    pieces: tuple[Piece, ...] | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Source:
    """Where rows come from: what `dataset` says, entry by entry."""

    path: str  # a file, a directory or a hub id
    weight: float | None = None  # its share of a mix; None: every row once
    split: str | None = None  # "train", "train[:5000]", "test[10%:20%]"; None: the training split, all of it
    dataset_format: str = "auto"
    columns: Mapping[str, str] | None = None  # key of the format -> column of the data
