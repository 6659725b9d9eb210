"""`halfbyte data run.yaml`"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from halfbyte.cli import EXIT_FAILED
from halfbyte.cli.flags import config_command
from halfbyte.config import DataConfig
from halfbyte.report.terminal import printable

if TYPE_CHECKING:
    from halfbyte.data.checks import Inspection
    from halfbyte.recipes.data import DataReport, ShownExample

LETTERS_SHOWN = 2400  # of an example: some 30 lines
BAR_WIDTH = 40
_NAME_WIDTH = 10


@config_command(DataConfig)
@click.option("--rows", default=3, type=click.IntRange(0), metavar="INTEGER", help="Rows to show. [default: 3]")
@click.option(
    "--findings", default=5, type=click.IntRange(1), metavar="INTEGER", help="Places to name of a kind. [default: 5]"
)
@click.option("--histogram", metavar="FILE.png", help="Draw the lengths as a picture, too; needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, for scripts.")
def command(config: DataConfig, rows: int, findings: int, histogram: str | None, as_json: bool) -> None:
    """Examine a data set before training on it.

    Shows the first rows with what is learned of them, how long the rows are, and what is wrong, with file and line.
    Takes what finetune takes, of which the model (for its tokenizer and its template) and the data set are required.
    The exit code is 1 if finetune would refuse the data.
    """
    from halfbyte.recipes.data import examine_data

    report = examine_data(config, Console(stderr=True), rows, findings)
    if histogram is not None:
        from halfbyte.report.histogram import draw_png

        lengths = {f"{name}: {found.name}": found.lengths for name, found in report.inspections.items()}
        draw_png(lengths, config.max_length, Path(histogram))
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n")
    else:
        _show(report, Console(highlight=False))
        if histogram is not None:
            sys.stdout.write(f"the lengths are drawn in {histogram}\n")
    if report.spoiled:
        raise click.exceptions.Exit(EXIT_FAILED)


def _show(report: "DataReport", console: Console) -> None:
    if report.first:
        _show_first(report, console)
    for name, inspection in report.inspections.items():
        console.print(Text(f"{name}: {printable(inspection.name)}", "bold"), soft_wrap=True)
        _show_figures(inspection, console)
        if inspection.lengths:
            _show_histogram(inspection, report.config.max_length, console)
        console.print()
    for name, inspection in report.inspections.items():
        _show_findings(name, inspection, console)
    _show_verdict(report, console)


def _show_first(report: "DataReport", console: Console) -> None:
    colours = console.color_system is not None
    how = "green is learned" if colours else "⟦what is in brackets⟧ is learned"
    number = len(report.first)
    what = "the first example" if number == 1 else f"the first {number} examples"
    console.print(f"[bold]{what}[/]: {how}, the rest only read\n")
    for shown in report.first:
        _show_example(shown, report.control_tokens, console)


def _show_example(shown: "ShownExample", control_tokens: tuple[str, ...], console: Console) -> None:
    from halfbyte.data.checks import find_control_tokens
    from halfbyte.report.masked import masked_text

    console.print(
        f"[bold]{shown.source}[/]  {shown.tokens:,} tokens, {shown.supervised_tokens:,} learned", soft_wrap=True
    )
    text = masked_text(
        shown.pieces, find_control_tokens(control_tokens), console.color_system is not None, LETTERS_SHOWN
    )
    text.rstrip()
    for line in text.wrap(console, console.width - 2):
        console.print(Text("  ") + line)
    console.print()


def _show_figures(inspection: "Inspection", console: Console) -> None:
    from halfbyte.report.histogram import percentile

    statistics, lengths = inspection.statistics, inspection.lengths
    bad = inspection.findings.bad_rows
    figures = {"rows": f"{statistics.rows:,}" + (f", and [red]{bad:,} that would spoil a run[/]" if bad else "")}
    if statistics.examples != statistics.rows:
        figures["examples"] = f"{statistics.examples:,}"
    if lengths:
        share = statistics.supervised_tokens / statistics.tokens
        half, most = percentile(lengths, 0.5), percentile(lengths, 0.95)
        figures |= {
            "tokens": f"{statistics.tokens:,}",
            "learned": f"{statistics.supervised_tokens:,}, {share:.1%} of the tokens",
            "lengths": f"{min(lengths):,} to {statistics.longest:,} tokens; half at most {half:,}, 19 of 20 {most:,}",
        }
    for name, figure in figures.items():
        console.print(f"[dim]{name:<{_NAME_WIDTH}}[/]{figure}", soft_wrap=True)


def _show_histogram(inspection: "Inspection", max_length: int, console: Console) -> None:
    from halfbyte.report.histogram import bar, bins_of

    bins = bins_of(inspection.lengths)
    most = max(bin_.count for bin_ in bins)
    spans = [f"{bin_.first:,}" if bin_.first == bin_.last else f"{bin_.first:,}–{bin_.last:,}" for bin_ in bins]
    width = max(map(len, spans))
    for bin_, span in zip(bins, spans, strict=True):
        name = "tokens" if bin_ is bins[0] else ""
        line = Text.assemble((f"{name:<{_NAME_WIDTH}}{span:>{width}}  ", "dim"))
        line.append(bar(bin_.count, most, BAR_WIDTH), "yellow" if bin_.last > max_length else "green")
        line.append(f" {bin_.count:,}" if bin_.count else "")
        if bin_.first <= max_length < bin_.last:
            line.append(f"  max_length is {max_length:,}", "yellow")
        line.rstrip()
        console.print(line, soft_wrap=True)


def _show_findings(name: str, inspection: "Inspection", console: Console) -> None:
    from halfbyte.data.findings import KINDS

    findings = inspection.findings
    for spoils, heading, style in ((True, "would spoil a run", "bold red"), (False, "worth knowing", "bold yellow")):
        kinds = {key: kind for key, kind in KINDS.items() if kind.spoils == spoils and key in findings.counts}
        if not kinds:
            continue
        console.print(Text(f"{name}: {heading}", style))
        for key, kind in kinds.items():
            count, kept = findings.counts[key], findings.kept[key]
            console.print(Text.assemble((f"{count:>7,}  ", style), (kind.title, "bold")), soft_wrap=True)
            console.print(Text(f"{'':9}{kind.meaning}", "dim"), soft_wrap=True)
            for finding in kept:
                place = (printable(finding.source), "cyan")
                console.print(Text.assemble(" " * 9, place, f"  {printable(finding.detail)}"), soft_wrap=True)
            if count > len(kept):
                console.print(Text(f"{'':9}and {count - len(kept):,} more", "dim"))
        console.print()


def _show_verdict(report: "DataReport", console: Console) -> None:
    bad = sum(inspection.findings.bad_rows for inspection in report.inspections.values())
    noted = any(inspection.findings.counts for inspection in report.inspections.values())
    cap = report.config.skip_bad_rows
    if report.spoiled and bad:
        most = max(inspection.findings.bad_rows for inspection in report.inspections.values())
        allowed = f" and skip_bad_rows allows {cap:,}" if cap else ""
        verdict = (
            f"[bold red]finetune would stop[/]: {_rows(bad)} would spoil a run{allowed}; mend what is named above,"
        )
        console.print(f"{verdict} or leave them out with --skip_bad_rows {most}", soft_wrap=True)
    elif report.spoiled:
        console.print("[bold red]finetune would stop[/]: there is no row to learn from", soft_wrap=True)
    elif bad:
        console.print(f"[yellow]finetune would go on[/] without {_rows(bad)}, as skip_bad_rows allows", soft_wrap=True)
    elif noted:
        console.print("[green]nothing here would spoil a run[/]; what is worth knowing is above", soft_wrap=True)
    else:
        console.print("[green]nothing is wrong with these data[/], as far as can be seen", soft_wrap=True)


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"
