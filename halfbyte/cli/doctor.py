"""`halfbyte doctor`"""

import json
import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.recipes.doctor import DoctorReport
    from halfbyte.recipes.self_test import OpCheck


@click.command(context_settings={"max_content_width": 110})
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, for scripts and bug reports.")
def command(as_json: bool) -> None:
    """Show what halfbyte sees of this machine, and test every kernel against its reference.

    The exit code is 1 if a kernel fails.
    """
    try:
        from halfbyte.recipes.doctor import examine
    except ImportError as error:
        raise HalfbyteError(f"halfbyte is not fully installed ({error}); run make setup") from error

    report = examine()
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        _show(report)
    if not report.healthy:
        raise click.exceptions.Exit(1)


def _show(report: "DoctorReport") -> None:
    console = Console(highlight=False)
    sections = {
        "machine": _machine(report),
        f"implementations: chosen is {report.choice}": _implementations(report),
        "self-test: milliseconds a call, billions of values a second": _checks(report),
    }
    for title, table in sections.items():
        console.print(f"[bold]{escape(title)}[/]")
        console.print(table)
        console.print()
    failed = [check for check in report.checks if not check.passed]
    for check in failed:
        console.print(f"[bold red]FAILED[/]: {check.op} in {check.implementation}: {check.detail}")
    if failed:
        console.print("please report this, with what halfbyte doctor --json prints")
    else:
        console.print(
            f"[green]all {len(report.checks)} checks passed[/]: codes and dequantized weights equal the reference's "
            "byte for byte, the rest is no further from float32 than the reference is"
        )


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=bool(headings), header_style="dim")
    for heading in headings:
        table.add_column(heading)
    return table


def _machine(report: "DoctorReport") -> Table:
    gib = 2**30
    copies = report.openmp_libraries
    openmp = f"{len(copies)} OpenMP runtime{'s' * (len(copies) != 1)}"
    if len(copies) > 1:
        openmp = f"[yellow]{openmp}, which fight for the cores: {escape(', '.join(copies))}[/]"
    optional = report.optional_packages.items()
    found = [*report.packages.items(), *((name, version) for name, version in optional if version is not None)]
    table = _table()
    table.add_row("CPU", f"{escape(report.cpu)} ({report.architecture}, {report.logical_cores} cores)")
    table.add_row("threads", f"{report.torch_threads} in torch, {openmp}")
    if report.load_average > report.logical_cores / 2:
        busy = f"{report.load_average:.1f} over the last minute: others use the cores, and the times below suffer"
        table.add_row("load", f"[yellow]{busy}[/]")
    table.add_row("memory", f"{report.memory_bytes / gib:.1f} GiB, {report.available_memory_bytes / gib:.1f} available")
    table.add_row("CUDA", escape(report.cuda))
    table.add_row("packages", ", ".join(f"{name} {version or '[red]missing[/]'}" for name, version in found))
    table.add_row("optional", ", ".join(name for name, version in optional if version is None) + " not installed")
    return table


def _implementations(report: "DoctorReport") -> Table:
    table = _table()
    for row in report.implementations:
        state = "[bold]chosen[/]" if row.chosen else "runs here" if row.available else "cannot run"
        table.add_row(f"[bold]{row.name}[/]" if row.chosen else row.name, state, f"needs {escape(row.needs)}")
    return table


def _checks(report: "DoctorReport") -> Table:
    """Ops down, implementations across."""
    implementations = list(dict.fromkeys(check.implementation for check in report.checks))
    table = _table("", *implementations)
    table.columns[0].no_wrap = True
    for op in dict.fromkeys(check.op for check in report.checks):
        cells = {check.implementation: _cell(check) for check in report.checks if check.op == op}
        table.add_row(op, *(cells.get(name, "") for name in implementations))
    return table


def _cell(check: "OpCheck") -> str:
    result = "[green]OK[/]" if check.passed else "[bold red]FAILED[/]"
    return f"{result} {_figure(1000 * check.seconds)}\n{_figure(check.values_per_second / 1e9)} G/s"


def _figure(number: float) -> str:
    return f"{number:.3g}" if number >= 1 else f"{number:.2f}"
