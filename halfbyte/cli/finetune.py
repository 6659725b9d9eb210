"""`halfbyte finetune run.yaml`"""

import click
import yaml
from rich.console import Console

from halfbyte.cli.flags import config_command
from halfbyte.config import FinetuneConfig


@config_command(FinetuneConfig)
@click.option(
    "--dry_run", is_flag=True, help="Print the resolved configuration and the first masked example, and stop."
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
        recipe.finetune(config, console)
