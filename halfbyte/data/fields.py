"""The fields of a record, checked: what is missing or of another type is told with the place and the key."""

import json
import re
from typing import Any

from halfbyte.errors import HalfbyteError

_SURROGATE = re.compile("[\ud800-\udfff]")


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise HalfbyteError(f"{where}: the key '{key}' is missing")
    value = record[key]
    if not isinstance(value, str):
        raise HalfbyteError(f"{where}: '{key}' must be text, this is {kind(value)}")
    if _SURROGATE.search(value):
        raise HalfbyteError(f"{where}: '{key}' holds half of a surrogate pair, which no tokenizer can read: remove it")
    return value


def filled_field(record: dict[str, Any], key: str, where: str) -> str:
    """A text with more in it than white space."""
    value = text_field(record, key, where)
    if not value.strip():
        raise HalfbyteError(f"{where}: '{key}' is empty: fill it or remove the row")
    return value


def list_field(record: dict[str, Any], key: str, where: str) -> list[Any]:
    """A list, or the JSON text of one: a table's cell has no other way to hold it."""
    if key not in record:
        raise HalfbyteError(f"{where}: the key '{key}' is missing")
    value = from_json_text(record[key])
    if not isinstance(value, list):
        raise HalfbyteError(f"{where}: '{key}' must be a list, this is {kind(value)}")
    return value


def from_json_text(value: Any) -> Any:
    """What a text says that is JSON of a list or an object; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_texts(value: Any, where: str) -> None:
    """Raises HalfbyteError where a text in here, however deep, holds half of a surrogate pair."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str) and _SURROGATE.search(part):
            raise HalfbyteError(f"{where} holds half of a surrogate pair, which no tokenizer can read: remove it")
        if isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            waiting += part


def kind(value: Any) -> str:
    """A value in a reader's words."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"of the type {type(value).__name__}")
