"""`halfbyte inspect runs/first`"""

import json
import sys

import click
from rich.console import Console

from halfbyte.report.terminal import printable


@click.command(context_settings={"max_content_width": 110})
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON, for scripts.")
def command(path: str, as_json: bool) -> None:
    """Say what a directory or a file holds, what it came from and what it fits.

    PATH is a run's directory, an adapter, a checkpoint, a model, a merge, a .safetensors or a .gguf file. Only headers
    are read, so a model of any size takes a moment.
    """
    from halfbyte.recipes.inspect import inspect

    found = inspect(path)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), ensure_ascii=False, indent=2) + "\n")
        return
    console = Console(highlight=False)
    console.print(printable(found.path), style="bold", markup=False, soft_wrap=True)
    for heading, sentences in (("holds", found.holds), ("comes from", found.from_), ("fits", found.fits)):
        for index, sentence in enumerate(sentences):
            console.print(f"{heading if not index else '':<12}{printable(sentence)}", markup=False, soft_wrap=True)
