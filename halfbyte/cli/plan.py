"""`halfbyte plan run.yaml --max_memory 24GB`"""

import json
import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli.flags import config_command
from halfbyte.config import PlanConfig

if TYPE_CHECKING:
    from halfbyte.recipes.plan import PlanReport


@config_command(PlanConfig)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, in bytes and seconds.")
@click.option("--no_time", is_flag=True, help="Leave out the ten seconds in which this machine is timed.")
def command(config: PlanConfig, as_json: bool, no_time: bool) -> None:
    """Tell what a fine-tuning run will take, without its weights and before it is begun.

    Takes what finetune takes, of which the model alone is required: its config.json is enough. With --max_memory it
    answers for a machine that is not this one, and says what to change in a run that does not fit.
    """
    from halfbyte.recipes.plan import plan

    report = plan(config, Console(stderr=True), with_time=not no_time)
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        _show(report, config)


def _show(report: "PlanReport", config: PlanConfig) -> None:
    plan, console = report.plan, Console(highlight=False)
    settings = plan.settings
    passes = "1 pass" if settings.accumulation == 1 else f"{settings.accumulation} passes"
    console.print(
        f"{config.model_name_or_path}: {report.parameters:,} parameters, {report.quantized_parameters:,} of them in 4"
        f" bits; {settings.rows} × {settings.length} tokens a pass, {passes} a step",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    sections = {
        "in memory, bytes": _sizes(plan.parts(), "in all"),
        "at most, bytes": _sizes(plan.moments(), None),
        "activations, by what is computed again": _levels(report),
    }
    for title, table in sections.items():
        console.print(f"\n[bold]{title}[/]")
        console.print(table)
    console.print()
    _show_verdict(report, console)
    _show_time(report, console)


def _show_verdict(report: "PlanReport", console: Console) -> None:
    from halfbyte.recipes.planning import describe_changes, describe_pages

    plan = report.plan
    peak = f"{plan.peak_bytes / 1e9:.2f} GB at most, in {plan.peak_moment}; {plan.budget_bytes / 1e9:.2f} GB are there"
    if plan.fits:
        console.print(f"[green]it fits[/]: {peak}", soft_wrap=True)
        if plan.peak_bytes > plan.budget_bytes:
            console.print(describe_pages(plan), soft_wrap=True)
        return
    console.print(f"[bold red]it does not fit[/]: {peak}", soft_wrap=True)
    if report.advice is None:
        console.print("nothing that could be changed makes it fit: take a smaller model, or more memory")
        return
    console.print(
        f"with {describe_changes(report.advice.changes)} it does, at {report.advice.plan.least_bytes / 1e9:.2f} GB",
        markup=False,
        soft_wrap=True,
    )


def _show_time(report: "PlanReport", console: Console) -> None:
    if report.step_seconds is None:
        return
    line = f"{_duration(report.step_seconds)} a step on this machine"
    if report.run_seconds is not None:
        line += f", {_duration(report.run_seconds)} for {report.steps:,} steps"
    console.print(line, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _sizes(sizes: dict[str, int], total: str | None) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    if total is not None:
        table.add_row(f"[bold]{total}[/]", f"[bold]{sum(sizes.values()):,}[/]")
    return table


def _levels(report: "PlanReport") -> Table:
    """What each level takes, and how many tokens a pass may have at it."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("")
    for heading in ("bytes", "peak of the run", "tokens a pass that fit"):
        table.add_column(heading, justify="right")
    plan = report.plan
    for level, figures in report.to_dict()["levels"].items():
        name = f"[bold]{level}[/], taken" if level == plan.settings.level else level
        table.add_row(name, *(f"{figures[key]:,}" for key in ("activation_bytes", "peak_bytes", "most_tokens")))
    return table
