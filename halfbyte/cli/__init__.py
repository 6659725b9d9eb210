"""The `halfbyte` command.

A subcommand is a file beside this one: it builds a configuration and calls one library function. Each is
imported when it is asked for, so that `halfbyte --help` answers at once. What a person did wrong is told in
one sentence on standard error, with exit code 2; an exception that is not a `HalfbyteError` is a bug of ours
and keeps its traceback.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import click

from halfbyte.config import nearest
from halfbyte.errors import HalfbyteError
from halfbyte.report.terminal import printable

# The one-line descriptions stand here because reading them from the subcommands would import those.
SUBCOMMANDS = {
    "finetune": "Fine-tune a model on your data: 4-bit base, low-rank adapters.",
    "data": "Examine a data set before training on it: masks, lengths, defects.",
    "plan": "Tell what a fine-tuning run will take: memory, its peak, time.",
    "evaluate": "Measure a model, with or without an adapter, on held-out rows.",
    "generate": "Answer one prompt.",
    "chat": "Talk with a model in the terminal, adapters switched in place.",
    "quantize": "Write a model as a 4-bit checkpoint.",
    "merge": "Write a model with an adapter merged into it.",
    "inspect": "Say what a directory or a file holds, and where it came from.",
    "doctor": "Show what halfbyte sees of this machine, and test every kernel.",
}

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Subcommands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in SUBCOMMANDS:
            return None
        command = importlib.import_module(f"halfbyte.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in SUBCOMMANDS and not args[0].startswith("-"):
            meant = nearest(args[0], list(SUBCOMMANDS))
            advice = f"did you mean {meant}?" if meant else f"there are {', '.join(SUBCOMMANDS)}"
            raise click.UsageError(f"there is no command {args[0]!r}: {advice}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


@click.group(
    cls=_Subcommands,
    invoke_without_command=True,
    context_settings={"max_content_width": 110},
    epilog="halfbyte COMMAND --help shows what a command takes.",
)
@click.version_option(package_name="halfbyte", message="halfbyte %(version)s")
@click.pass_context
def _halfbyte(ctx: click.Context) -> None:
    """Fine-tune language models in 4 bits, on the machine you have."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def quiet_dependencies() -> None:
    """Keep what transformers and PEFT tell their developers from a person's terminal; before they are imported.

    A model that is refused would otherwise be so with a page of its tensors in front of the one sentence. Whoever
    wants it sets TRANSFORMERS_VERBOSITY, or python -W.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    quiet_dependencies()
    try:
        # Not `Command.main`, which takes any EOFError for a wish to stop.
        with _halfbyte.make_context("halfbyte", list(sys.argv[1:] if args is None else args)) as ctx:
            _halfbyte.invoke(ctx)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        return _complain(_usage_sentence(error))
    except HalfbyteError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `halfbyte doctor | head`: the reader has gone. Python would complain again when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return 0


def _usage_sentence(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if isinstance(error, click.NoSuchOption) and ctx is not None:
        flags = [flag for parameter in ctx.command.get_params(ctx) for flag in parameter.opts]
        meant = nearest(error.option_name.lstrip("-"), [flag.lstrip("-") for flag in flags])
        advice = f"did you mean --{meant}?" if meant else f"{ctx.command_path} --help lists the flags"
        return f"unknown flag {error.option_name}: {advice}"
    sentence = error.format_message().rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _complain(sentence: str) -> int:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), printable(sentence).removesuffix("."))
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)
    return EXIT_BAD_INPUT
