"""From a YAML file and flags to a configuration, or to one sentence that says where they are wrong."""

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from halfbyte.config.keys import Config
from halfbyte.config.words import allowed, nearest
from halfbyte.errors import HalfbyteError

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
