"""A causal language model in 4 bits, built on the meta device and filled tensor by tensor."""

import sys
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.gguf import read_gguf_tensors
from halfbyte.huggingface.quantizer import QUANT_METHOD, QuantizationConfig, first_conversion_error
from halfbyte.huggingface.source import Source, locate, read_config, read_safetensors


def load_model(
    model_name_or_path: str,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model that transformers knows, its linear layers in 4 bits.

    One tensor at a time is in memory in 16 bits. The output layer, embeddings and tied weights stay in
    `compute_dtype`. A 4-bit checkpoint (ours or bitsandbytes') is taken as it is, whatever is asked for.

    Args:
        model_name_or_path: a directory with config.json and safetensors, a `.gguf` file, or a hub id.
        quant_type: `nf4`, `fp4`, `int4`, or `none` for a model in `compute_dtype`.
        block_size: values that share one absmax; a power of two, 32 to 4096.
        double_quant: store the absmax in 8 bits.
        compute_dtype: of products and of what is not quantized.

    Raises:
        HalfbyteError: no such model, an unknown architecture, a missing or broken file or tensor, a weight
            that holds NaN or infinity.
    """
    source = locate(model_name_or_path)
    config = read_config(source)
    tokenizer = load_tokenizer(source)
    quantization = None
    if quant_type != "none":
        quantization = QuantizationConfig(quant_type, block_size, double_quant, compute_dtype)
    if source.gguf_file:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        tensors, conversions = read_gguf_tensors(source.gguf_file, config, model_class, compute_dtype)
        if conversions:
            # The quantizer is what hands conversions to transformers, so it is there even if it quantizes nothing.
            quantization = quantization or QuantizationConfig(compute_dtype=compute_dtype, skip_modules=[".*"])
            quantization.conversions = conversions
    else:
        tensors = read_safetensors(source.directory)
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        read = QuantizationConfig.from_bitsandbytes(saved, compute_dtype)
        # transformers wants a dictionary here, and then takes the checkpoint as quantized already
        config.quantization_config = {"quant_method": QUANT_METHOD, **vars(read)}
        quantization = None
    model = _build(source, config, tensors, quantization, compute_dtype, device)
    return model, tokenizer


def load_tokenizer(source: Source | str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.  Raises HalfbyteError where there is none."""
    source = locate(source) if isinstance(source, str) else source
    kwargs = {"gguf_file": source.gguf_file.name} if source.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(source.directory, **kwargs)
    except Exception as error:  # whatever transformers and tokenizers raise on files that they cannot read
        reason = str(error).strip().splitlines()[0]
        raise HalfbyteError(f"{source.path} holds no tokenizer that can be read ({reason}).") from error


def _build(
    source: Source,
    config: PreTrainedConfig,
    tensors: dict[str, Any],
    quantization: QuantizationConfig | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PreTrainedModel:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not sys.stderr.isatty():
        disable_progress_bar()  # a bar that cannot be redrawn is a page of noise
    try:
        with first_conversion_error():
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                quantization_config=quantization,
                dtype=dtype,
                device_map={"": torch.device(device)},
                output_loading_info=True,
            )
    except HalfbyteError as error:
        raise HalfbyteError(f"{source.path}: {error}") from error
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HalfbyteError(f"{source.path} does not fit its configuration: {reason}") from error
    if report["missing_keys"]:
        first = min(report["missing_keys"])
        raise HalfbyteError(
            f"{source.path} lacks {len(report['missing_keys'])} of the model's tensors, among them {first}."
        )
    if (source.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.directory)
    model.config.name_or_path = source.name
    model.name_or_path = source.name
    return model.eval()
