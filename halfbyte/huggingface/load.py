"""A causal language model in 4 bits, built on the meta device and filled tensor by tensor."""

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
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
from halfbyte.huggingface.gguf_tokenizer import read_as_llama_cpp
from halfbyte.huggingface.lent import Lender
from halfbyte.huggingface.mapped import MappedFile, freeze_mapped, map_safetensors
from halfbyte.huggingface.patch import accelerate_model
from halfbyte.huggingface.prefetch import prefetch_layers
from halfbyte.huggingface.quantizer import QUANT_METHOD, QuantizationConfig, first_conversion_error
from halfbyte.huggingface.safetensors_files import read_safetensors
from halfbyte.huggingface.source import Source, locate, read_config, reason
from halfbyte.nn import PackedWeights

_EVERY_MODULE = ".*"  # to skip, where nothing is to be quantized


def load_model(
    model_name_or_path: str,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    fast: bool = True,
    mapped: bool = True,
    quantize_embeddings: bool = False,
    quantize_output_layer: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model that transformers knows, its linear layers in 4 bits.

    One tensor at a time is in memory in 16 bits. The output layer, embeddings and tied weights stay in
    `compute_dtype`. A 4-bit checkpoint (ours or bitsandbytes') is taken as it is, whatever is asked for, and on the CPU
    its weights are pages of its files: shared between processes, read when they are used, and read-only.

    Args:
        model_name_or_path: a directory with config.json and safetensors, a `.gguf` file, or a hub id.
        quant_type: `nf4`, `fp4`, `int4`, or `none` for a model in `compute_dtype`.
        block_size: values that share one absmax; a power of two, 32 to 4096.
        double_quant: store the absmax in 8 bits.
        compute_dtype: of products and of what is not quantized.
        fast: halfbyte's norms, gated MLPs, rotary embedding and loss in place of the model's own, each only where
            it is found to compute the same; `replacements_of(model)` tells which.
        mapped: false for a 4-bit checkpoint in memory of the process's own: to write to its weights in place, which
            ends the process where they are mapped, or where its files are on a disk that may go away.
        quantize_embeddings, quantize_output_layer: these in 4 bits, too; where they are one tensor, both or neither.

    Raises:
        HalfbyteError: no such model, an unknown architecture, a missing or broken file or tensor, a weight
            that holds NaN or infinity.
    """
    source = locate(model_name_or_path)
    config = read_config(source)
    tokenizer = load_tokenizer(source)
    quantization = None
    if quant_type != "none":
        # What replaces the model's operations looks at weights, which are to be in their place then: done below.
        quantization = QuantizationConfig(
            quant_type,
            block_size,
            double_quant,
            compute_dtype,
            fast=False,
            quantize_embeddings=quantize_embeddings,
            quantize_output_layer=quantize_output_layer,
        )
    saved = getattr(config, "quantization_config", None)
    files: list[MappedFile] = []
    lender = None
    if source.gguf_file:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        tensors, conversions = read_gguf_tensors(source.gguf_file, config, model_class, compute_dtype)
        if conversions:
            # The quantizer is what hands conversions to transformers, so it is there even if it quantizes nothing.
            quantization = quantization or QuantizationConfig(
                compute_dtype=compute_dtype, skip_modules=[_EVERY_MODULE], fast=False
            )
            quantization.conversions = conversions
    elif saved is not None and mapped and torch.device(device).type == "cpu":
        tensors, files = map_safetensors(source.directory)
    elif saved is None and quantization is not None:
        lender = Lender(source.directory)
        tensors = lender.tensors
    else:
        tensors = read_safetensors(source.directory)
    if saved is not None:
        try:
            read = QuantizationConfig.from_bitsandbytes(saved, compute_dtype)
        except HalfbyteError as error:
            raise HalfbyteError(f"{source.directory}/{error}") from error
        # transformers wants a dictionary here, and then takes the checkpoint as quantized already
        config.quantization_config = {"quant_method": QUANT_METHOD, **vars(read), "fast": False}
        quantization = None
    model = _build(source, config, tensors, quantization, compute_dtype, device)
    if lender is not None:
        lender.settle(model)
    if files:
        freeze_mapped(model, files)
        prefetch_layers(model, files)
    if fast:
        accelerate_model(model)
    return model, tokenizer


def load_tokenizer(source: Source | str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.  Raises HalfbyteError where there is none."""
    source = locate(source) if isinstance(source, str) else source
    read_config(source)  # transformers looks there too, and would blame the tokenizer for what is wrong in it
    kwargs = {"gguf_file": source.gguf_file.name} if source.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=False, **kwargs)
        if source.gguf_file:
            read_as_llama_cpp(tokenizer, source.gguf_file)
        return tokenizer
    except Exception as error:  # whatever transformers and tokenizers raise on files that they cannot read
        raise HalfbyteError(f"{source.path} holds no tokenizer that can be read ({reason(error)}).") from error


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
    build_on_meta(source, config, dtype)
    try:
        with first_conversion_error(), _quiet_transformers():
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                quantization_config=quantization,
                dtype=dtype,
                device_map={"": torch.device(device)},
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except HalfbyteError as error:
        raise HalfbyteError(f"{source.path}: {error}") from error
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise HalfbyteError(f"{source.path} cannot be loaded: {reason(error)}.") from error
    _check_complete(source, model, report)
    if quantization is not None and _EVERY_MODULE in (quantization.skip_modules or []):
        model.hf_quantizer.remove_quantization_config(model)
    elif quantization is not None and not any(isinstance(module, PackedWeights) for module in model.modules()):
        raise HalfbyteError(f"{source.path} has no linear layer that can be in 4 bits; use quant_type none.")
    model.generation_config = _read_generation_config(source) or model.generation_config
    model.config.name_or_path = source.name
    model.name_or_path = source.name
    return model.eval()


def build_on_meta(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration, with shapes and no numbers.

    Raises:
        HalfbyteError: no model can be built from the configuration.
    """
    try:
        with torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # sizes that do not divide, names that are not known: every model has its own
        kind = type(error).__name__
        raise HalfbyteError(
            f"{source.path}: no model can be built from its config ({kind}: {reason(error)})."
        ) from error


def _check_complete(source: Source, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Every tensor was there, of the right shape and finite."""
    if report["missing_keys"]:
        first = min(report["missing_keys"])
        raise HalfbyteError(
            f"{source.path} lacks {len(report['missing_keys'])} of the model's tensors, among them {first}."
        )
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise HalfbyteError(
            f"{source.path}: {name} is {tuple(found)} where the model's config asks for {tuple(expected)}."
        )
    for name, parameter in model.named_parameters():
        # The extremes propagate NaN and need no memory. Codes are no numbers, and were checked when they were made.
        is_number = parameter.is_floating_point() and parameter.numel()
        if is_number and not all(extreme.isfinite() for extreme in parameter.aminmax()):
            raise HalfbyteError(f"{source.path}: {name} holds a NaN or an infinity.")


def _read_generation_config(source: Source) -> GenerationConfig | None:
    if source.gguf_file or not (source.directory / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(source.directory)
    except (OSError, ValueError, TypeError) as error:
        raise HalfbyteError(f"{source.directory}/generation_config.json cannot be read ({reason(error)}).") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the table of missing and broken tensors, with tracebacks in it: what it says is told in a sentence."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)  # a level would be read as a wish for other warnings
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
