"""A model as a 4-bit checkpoint, in the layout that bitsandbytes and transformers read."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.checkpoint.alignment import align_tensors
from halfbyte.checkpoint.files import directory_written_aside
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import load_model
from halfbyte.nn import PackedWeights


@dataclass(frozen=True)
class QuantizeResult:
    parameters: int  # of the whole model
    quantized_parameters: int  # in 4 bits
    bytes: int  # of the 4-bit weights with their constants
    bits_per_parameter: float  # of those
    seconds: float
    sha256: str  # of the 4-bit weights


def quantize(
    model_name_or_path: str,
    output_dir: str,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    overwrite: bool = False,
) -> QuantizeResult:
    """Quantize a model and write it, with its tokenizer, to `output_dir`.

    Raises:
        HalfbyteError: whatever `load_model` refuses; an output directory that holds something already.
    """
    started = time.perf_counter()
    target = Path(output_dir)
    if quant_type == "none":
        raise HalfbyteError("quant_type none is not a 4-bit type; use nf4, fp4 or int4.")
    if target.resolve() == Path(model_name_or_path).resolve():
        raise HalfbyteError(f"output_dir {target} is the model itself, which would be replaced; name another.")
    if target.is_file():
        raise HalfbyteError(f"output_dir {target} is a file; name a directory.")
    if target.is_dir() and any(target.iterdir()):
        is_model = (target / "config.json").is_file()
        if not (overwrite and is_model):
            way_out = "replace it with --overwrite_output_dir true" if is_model else "name a new one"
            raise HalfbyteError(f"output_dir {target} is not empty; {way_out}.")
    model, tokenizer = load_model(
        model_name_or_path, quant_type, block_size, double_quant, getattr(torch, compute_dtype)
    )
    layers = [module for module in model.modules() if isinstance(module, PackedWeights) and not module.is_tied]
    weights = [quantized for layer in layers for quantized in layer.all_quantized.values()]
    quantized_parameters = sum(weight.shape.numel() for weight in weights)
    quantized_bytes = sum(weight.nbytes for weight in weights)
    others = sum(p.numel() for p in model.parameters()) - sum(weight.packed.numel() for weight in weights)
    try:
        with directory_written_aside(target) as aside:
            model.save_pretrained(aside)
            for file in aside.glob("*.safetensors"):
                align_tensors(file)
            tokenizer.save_pretrained(aside)
    except OSError as error:
        raise HalfbyteError(f"output_dir {target} cannot be written ({error.strerror}); name another.") from error
    return QuantizeResult(
        parameters=others + quantized_parameters,
        quantized_parameters=quantized_parameters,
        bytes=quantized_bytes,
        bits_per_parameter=8 * quantized_bytes / max(1, quantized_parameters),
        seconds=time.perf_counter() - started,
        sha256=weights_sha256(model),
    )
