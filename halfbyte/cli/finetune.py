"""`halfbyte finetune run.yaml`"""

from typing import TYPE_CHECKING

import click
import yaml
from rich.console import Console

from halfbyte.cli import EXIT_INTERRUPTED
from halfbyte.cli.flags import config_command
from halfbyte.config import FinetuneConfig

if TYPE_CHECKING:
    from halfbyte.recipes.finetune import RunResult


@config_command(FinetuneConfig)
@click.option(
    "--dry_run", is_flag=True, help="Print the resolved configuration, the plan and the first masked example, and stop."
)
def command(config: FinetuneConfig, dry_run: bool) -> None:
    """Fine-tune a model on your data.

    The base model is frozen in 4 bits; low-rank adapters learn on top of it and are written to
    output_dir, as PEFT keeps them. Keys come from a YAML file, from flags, or from both; a flag wins.
    """
    from halfbyte.recipes import finetune as recipe

    console = Console()
    if dry_run:
        resolved = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        console.print(resolved, markup=False, highlight=False, soft_wrap=True)
        recipe.dry_run(config, console)
    else:
        _show(recipe.finetune(config, console), console)


def _show(result: "RunResult", console: Console) -> None:
    planned = "" if result.planned_bytes is None else f", {result.planned_bytes / 2**30:.2f} by the plan"
    held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out rows"
    console.print(
        f"{result.output_dir}: the adapter after {result.steps} of {result.total_steps} steps; loss {result.loss:.4f}"
        f"{held_out}; {result.tokens_per_second:,.0f} tokens/s, at most {result.peak_bytes / 2**30:.2f} GiB{planned}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if result.interrupted:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
