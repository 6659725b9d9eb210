"""`halfbyte quantize --model_name_or_path model --output_dir model-4bit`"""

from rich.console import Console

from halfbyte.cli.flags import config_command
from halfbyte.config import QuantizeConfig


@config_command(QuantizeConfig)
def command(config: QuantizeConfig) -> None:
    """Write a model as a 4-bit checkpoint, in the layout that bitsandbytes and transformers read."""
    from halfbyte.recipes.quantize import quantize

    arguments = config.to_dict()
    overwrite = arguments.pop("overwrite_output_dir")
    result = quantize(**arguments, overwrite=overwrite)
    Console(highlight=False).print(
        f"{config.output_dir}: {result.parameters:,} parameters, {result.quantized_parameters:,} of them at "
        f"{result.bits_per_parameter:.3f} bits; {result.bytes / 2**20:,.1f} MiB in {result.seconds:.1f} s\n"
        f"sha256 {result.sha256}",
        soft_wrap=True,
        markup=False,
    )
