"""`halfbyte generate --model_name_or_path model.gguf --adapter runs/first --prompt "..."`"""

import sys

from halfbyte.cli.flags import config_command
from halfbyte.config import GenerateConfig
from halfbyte.report.terminal import printable


@config_command(GenerateConfig)
def command(config: GenerateConfig) -> None:
    """Answer one prompt, as the model writes it."""
    from halfbyte.recipes.generate import generate

    arguments = config.to_dict()
    if config.prompt == "-":
        arguments["prompt"] = sys.stdin.read()
    generate(**arguments, stream=_write)
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(printable(text, keep="\n\t"))
    sys.stdout.flush()
