"""The words for a key: what it accepts, and which one was probably meant."""

import difflib
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Allowed:
    """The words for what a field accepts, where its type and bounds do not say it well enough."""

    text: str
    metavar: str  # what `--help` shows in the place of the value


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
    "template": "chat_template",
    "conversation_template": "chat_template",
    "chat_template_path": "chat_template",
    "default_system_message": "system_prompt",
    "train_on_inputs": "train_on_source",
    "mask_history": "train_on_last_turn",
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
