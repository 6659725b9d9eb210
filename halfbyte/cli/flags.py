"""Flags from a configuration class: one a key, with the key's name, description, bounds and default.

A flag's value reaches `load_config` as the text that was typed, so a value is checked in one place, and
complained about in one way, whether it came from a file or from the command line.
"""

from collections.abc import Callable
from typing import Any

import click
from pydantic.fields import FieldInfo

from halfbyte.config import Config, ConfigT, allowed, alternatives, load_config


def config_command(cls: type[ConfigT], positional: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """Make `function(config, **its own options)` a command that takes a YAML file, flags, or both.

    With `positional` the argument may also be that key's value: `halfbyte merge MODEL`; a name that ends in .yaml or
    .yml is a file all the same.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        own: list[click.Parameter] = list(reversed(getattr(function, "__click_params__", [])))

        def callback(config_file: str | None, **values: Any) -> None:
            options = {str(option.name): values.pop(str(option.name)) for option in own}
            flags = {key: text for key, text in values.items() if text is not None}
            if positional is not None and config_file is not None and not config_file.endswith((".yaml", ".yml")):
                flags, config_file = {positional: config_file, **flags}, None
            function(load_config(cls, config_file, flags), **options)

        metavar = (
            "[FILE.yaml]" if positional is None else f"[FILE.yaml|{allowed(cls.model_fields[positional]).metavar}]"
        )
        file = click.Argument(["config_file"], required=False, metavar=metavar)
        keys = [_flag(key, field) for key, field in cls.model_fields.items()]
        return _ConfigCommand(cls, own, params=[file, *keys, *own], callback=callback, help=function.__doc__)

    return decorate


class _ConfigCommand(click.Command):
    """A command whose `--help` shows the flags under their sections' titles."""

    def __init__(self, cls: type[Config], own: list[click.Parameter], **arguments: Any) -> None:
        super().__init__(name=None, context_settings={"max_content_width": 110}, **arguments)
        self._sections = {
            **cls.sections(),
            "Other": [option.opts[0].lstrip("-") for option in own] + ["help"],
        }

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = {parameter.opts[0].lstrip("-"): parameter for parameter in self.get_params(ctx)}
        for title, keys in self._sections.items():
            records = [record for key in keys if (record := parameters[key].get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(records)


def _flag(key: str, field: FieldInfo) -> click.Option:
    optional_value: dict[str, Any] = {}
    if bool in alternatives(field.annotation):
        optional_value = {"is_flag": False, "flag_value": "true"}
    note = ""
    if field.is_required():
        note = " [required]"
    elif field.default is not None:
        note = f" [default: {default_text(field.default)}]"
    return click.Option(
        [f"--{key}"], metavar=allowed(field).metavar, help=f"{field.description}{note}", **optional_value
    )


def default_text(default: Any) -> str:
    """A default as it would be typed: `true`, `tensorboard`, `2e-4`."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return ",".join(default) or "none"
    return f"{default:g}" if isinstance(default, float) else str(default)
