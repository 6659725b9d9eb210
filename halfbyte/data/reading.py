"""From JSON objects to rows: every row is a conversation that knows the line it came from.

    alpaca      {"instruction": "...", "input": "... or absent", "output": "..."}
    messages    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}

A row that cannot be trained on as it stands stops the reading with the file and the line: one bad row in
fifty thousand is found here, before a model is loaded, and not as a strange loss later. Other columns (an id,
a source, a topic) are left alone, except those that change what is learned: a row with `tools` or `history`
in it is refused, because reading it without them would teach something else.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.data.files import read_records
from halfbyte.data.rows import Alpaca, Row, Source
from halfbyte.errors import HalfbyteError

FORMATS = ("alpaca", "messages")
ROLES = ("system", "user", "assistant")

# Columns that other trainers act on. Present and not empty, they cannot be passed over in silence.
_UNREAD_COLUMNS = ("tools", "functions", "documents", "history", "system")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(
    path: str | Path,
    dataset_format: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    on_bad_row: Callable[[HalfbyteError], None] | None = None,
) -> Iterator[Row]:
    """The rows of a file, a directory or a hub id, one at a time."""
    return read_sources([Source(str(path), None, split, dataset_format, columns)], on_bad_row=on_bad_row)


def read_sources(
    sources: Sequence[Source], *, on_bad_row: Callable[[HalfbyteError], None] | None = None
) -> Iterator[Row]:
    """The rows of several data sets: one after the other, or mixed where they have weights."""
    for source in sources:
        dataset_format = source.dataset_format
        for record, where in read_records(Path(source.path)):
            if dataset_format == "auto":
                dataset_format = _detect_format(record, where)
            yield _alpaca_row(record, where) if dataset_format == "alpaca" else _messages_row(record, where)


def _detect_format(record: dict[str, Any], source: str) -> str:
    found = [name for name, key in (("alpaca", "instruction"), ("messages", "messages")) if key in record]
    if len(found) == 1:
        return found[0]
    if found:
        raise HalfbyteError(f"{source}: has both 'instruction' and 'messages': say which to use with dataset_format")
    keys = ", ".join(sorted(repr(key) for key in record))[:200] or "none"
    raise HalfbyteError(
        f"{source}: the format cannot be told from the keys ({keys}): "
        "a row needs 'messages', or 'instruction' and 'output'"
    )


def _alpaca_row(record: dict[str, Any], source: str) -> Row:
    instruction = _text(record, "instruction", source)
    output = _text(record, "output", source)
    context = "" if record.get("input") is None else _text(record, "input", source)
    for key, value in (("instruction", instruction), ("output", output)):
        if not value.strip():
            raise HalfbyteError(f"{source}: '{key}' is empty: fill it or remove the row")
    if not context.strip():
        context = ""
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction},
        {"role": "assistant", "content": output},
    ]
    return Row(messages, source, Alpaca(instruction, context, output))


def _messages_row(record: dict[str, Any], source: str) -> Row:
    if "messages" not in record:
        raise HalfbyteError(f"{source}: the key 'messages' is missing")
    turns = record["messages"]
    if not isinstance(turns, list):
        raise HalfbyteError(f"{source}: 'messages' must be a list, this is {_kind(turns)}")
    messages = [_message(turn, f"{source}: messages[{index}]") for index, turn in enumerate(turns)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise HalfbyteError(f"{source}: there is no assistant turn, so nothing to learn: add one or remove the row")
    if roles[0] == "assistant":
        raise HalfbyteError(f"{source}: the first message is an assistant turn: put what it answers before it")
    return Row(messages, source)


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise HalfbyteError(f"{where} must be an object with 'role' and 'content', this is {_kind(turn)}")
    role, content = _text(turn, "role", where), _text(turn, "content", where)
    if role not in ROLES:
        raise HalfbyteError(f"{where}: the role '{role[:40]}' is not known: use {', '.join(ROLES)}")
    extra = sorted(key for key, value in turn.items() if key not in ("role", "content") and value is not None)
    if extra:  # tool_calls, weight, thinking, ...: each would change what is learned
        raise HalfbyteError(f"{where}: '{extra[0][:40]}' is not something this version trains on: remove it")
    if role == "assistant" and not content.strip():
        raise HalfbyteError(f"{where}: the assistant turn is empty: fill it or remove the row")
    return {"role": role, "content": content}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise HalfbyteError(f"{where}: the key '{key}' is missing")
    value = record[key]
    if not isinstance(value, str):
        raise HalfbyteError(f"{where}: '{key}' must be text, this is {_kind(value)}")
    if _SURROGATE.search(value):
        raise HalfbyteError(f"{where}: '{key}' holds half of a surrogate pair, which no tokenizer can read: remove it")
    return value


def _kind(value: Any) -> str:
    """A JSON value in a reader's words."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
