"""`halfbyte merge MODEL --adapter runs/first --output merged`"""

import json
import sys
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from halfbyte.cli import EXIT_FAILED
from halfbyte.cli.flags import config_command
from halfbyte.config import MergeConfig
from halfbyte.report.terminal import printable

if TYPE_CHECKING:
    from halfbyte.recipes.audit import AuditResult
    from halfbyte.recipes.merge import MergeResult


@config_command(MergeConfig, positional="model_name_or_path")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for scripts.")
def command(config: MergeConfig, as_json: bool) -> None:
    """Write a model with adapters in its weights, which any program opens that opens the model.

    Weights are read, changed and written one at a time, and the output has its name when all of it is there. With
    --format gguf it is one file for llama.cpp, with a Modelfile for Ollama beside it. With
    --audit every way to merge is measured against the adapter on its 4-bit base, and the exit code is 1 where what was
    written is further from it than --max_kl.
    """
    from halfbyte.recipes.merge import run_merge

    result = run_merge(config, Console(stderr=True))
    if as_json:
        sys.stdout.write(json.dumps(result.to_dict(), ensure_ascii=False, indent=2) + "\n")
    else:
        console = Console(highlight=False)
        if result.audit is not None:
            _show_audit(result.audit, console)
        files = "1 file" if result.files == 1 else f"{result.files} files"
        console.print(
            f"written: {printable(result.output)}, {result.bytes / 2**20:,.1f} MiB in {files}\n"
            f"         {result.dtype}, {_what(config, result)}\n"
            f"         {result.seconds:.1f} s, at most {result.peak_bytes / 2**30:.2f} GiB of memory",
            soft_wrap=True,
            markup=False,
        )
        if result.modelfile is not None:
            console.print(f"         {printable(result.modelfile)} for Ollama", soft_wrap=True, markup=False)
    if result.audit is not None and not result.audit.passed:
        raise click.exceptions.Exit(EXIT_FAILED)


def _what(config: MergeConfig, result: "MergeResult") -> str:
    if config.adapter_only:
        return f"the adapter alone: it changes {result.changed} tensors of its base"
    if not config.adapter:
        return f"the {result.onto} weights, nothing merged into them"
    known = {
        True: "the base of the training",
        False: "another base than the training's",
        None: "a base that is not known to be the training's",
    }
    base = known[result.verified]
    return f"{result.changed} tensors changed, onto the {result.onto} weights of {base}"


def _show_audit(audit: "AuditResult", console: Console) -> None:
    made = ", made from the tokenizer: perplexity says nothing" if audit.made_text else ""
    console.print(f"{audit.rows} rows, {audit.tokens:,} tokens{made}", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for heading in ("MiB", "perplexity", "mean KL", "worst KL", "same token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in audit.figures:
        size = "" if each.bytes is None else f"{each.bytes / 2**20:,.1f}"
        figures = f"{each.perplexity:,.3f}", f"{each.mean_kl:.2g}", f"{each.worst_kl:.2g}", f"{each.agreement:.2%}"
        table.add_row(each.name, size, *figures, style="bold" if each.name == audit.shipped else "")
    console.print(table)
    if not audit.passed:
        kl = audit.of(audit.shipped).mean_kl
        console.print(
            f"[bold red]too far[/]: {audit.shipped} is written, with a mean KL of {kl:.2g} where at most"
            f" {audit.max_kl:g} is asked for",
            soft_wrap=True,
        )
    console.print(audit.verdict, soft_wrap=True, markup=False)
