"""`halfbyte evaluate --model_name_or_path model.gguf --adapter runs/first --dataset heldout.jsonl`"""

import json
import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfbyte.cli.flags import config_command
from halfbyte.config import EvaluateConfig
from halfbyte.report.terminal import printable

if TYPE_CHECKING:
    from halfbyte.recipes.evaluate import EvaluationResult

SAMPLES_SHOWN = 5


@config_command(EvaluateConfig)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for scripts.")
def command(config: EvaluateConfig, as_json: bool) -> None:
    """Measure a model on held-out rows: loss, perplexity and exact matches.

    With --adapter the adapter is put on first; run it once without to see what the adapter changed.
    """
    from halfbyte.recipes.data_sources import describe_sources, training_sources
    from halfbyte.recipes.evaluate import evaluate

    result = evaluate(config, Console(stderr=True))
    if as_json:
        sys.stdout.write(json.dumps(result.to_dict(), ensure_ascii=False, indent=2) + "\n")
        return
    console = Console(highlight=False)
    what = f"{config.model_name_or_path} with {config.adapter}" if config.adapter else config.model_name_or_path
    console.print(f"{what} on {describe_sources(training_sources(config))}", style="bold", markup=False, soft_wrap=True)
    console.print(_figures(result))
    if result.samples:
        console.print(
            f"\nthe first {len(result.samples[:SAMPLES_SHOWN])} of {len(result.samples)} answers", style="bold"
        )
        console.print(_samples(result))
    if config.output is not None:
        console.print(f"written to {config.output}", markup=False, soft_wrap=True)


def _figures(result: "EvaluationResult") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows", f"{result.rows:,}")
    table.add_row("supervised tokens", f"{result.supervised_tokens:,}")
    table.add_row("loss", f"{result.loss:.4f}")
    table.add_row("perplexity", f"{result.perplexity:,.3f}")
    if result.exact_match is not None:
        table.add_row("exact match", f"{result.exact_match:.1%}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    return table


def _samples(result: "EvaluationResult") -> Table:
    table = Table(show_lines=True)
    for heading in ("prompt", "expected", "got"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_column("match")
    for sample in result.samples[:SAMPLES_SHOWN]:
        prompt, expected, got = (
            Text(printable(text, keep="\n\t")) for text in (sample.prompt, sample.expected, sample.got)
        )
        match = Text("yes", "green") if sample.got == sample.expected else Text("no", "red")
        table.add_row(prompt, expected, got, match)
    return table
