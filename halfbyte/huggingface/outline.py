"""A model without numbers: what loading one and putting adapters on it would make, on torch's `meta` device.

Every class that transformers knows is built from its configuration alone; the quantizer that loading uses says which
of its layers would be in 4 bits, and PEFT where adapters would be. What all of it takes can then be counted.
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from halfbyte import formats
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.load import build_on_meta
from halfbyte.huggingface.peft import wrap_model
from halfbyte.huggingface.quantizer import QuantizationConfig, Quantizer
from halfbyte.huggingface.safetensors_files import LARGE_BYTES
from halfbyte.huggingface.source import locate, read_config
from halfbyte.nn import Linear4bit
from halfbyte.quant import quantized_bytes


@dataclass(frozen=True)
class Inventory:
    """What a model with adapters holds, in bytes, each tensor once."""

    parameters: int  # of the base model
    quantized_parameters: int
    quantized_bytes: int  # codes and constants
    remainder_bytes: int  # embeddings, norms, biases, the output layer, tables
    largest_tensor_bytes: int  # before it is quantized: what loading holds beside what it has loaded
    adapter_sizes: tuple[int, ...]  # values of each trained tensor
    vocabulary: int
    layers: int


def outline_model(
    model_name_or_path: str,
    lora: LoraConfig,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> PeftModel:
    """The model that `load_model` and `add_lora` would make, with shapes and no numbers; no weight is read.

    A 4-bit checkpoint keeps its own type; its block size, which only its weights tell, is taken to be `block_size`.

    Raises:
        HalfbyteError: no such model, an unknown architecture, a `target_modules` that names nothing in it.
    """
    source = locate(model_name_or_path, with_weights=False)
    config = read_config(source)
    saved = getattr(config, "quantization_config", None)
    quantization = None
    if saved is not None:
        try:
            quantization = QuantizationConfig.from_bitsandbytes(saved, compute_dtype)
        except HalfbyteError as error:
            raise HalfbyteError(f"{source.directory}/{error}") from error
    elif quant_type != "none":
        quantization = QuantizationConfig(quant_type, block_size, double_quant, compute_dtype)
    model = build_on_meta(source, config, compute_dtype)
    if quantization is not None:
        quantizer = Quantizer(quantization, pre_quantized=saved is not None)
        quantizer._process_model_before_weight_loading(model)
    with torch.device("meta"):
        return wrap_model(model, copy.deepcopy(lora))


def take_inventory(model: PeftModel) -> Inventory:
    """Count what an outline, or a real model, holds."""
    base = model.get_base_model()
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    sizes = [layer.in_features * layer.out_features for layer in linears]
    in_4_bits = [
        quantized_bytes(size, layer.block_size, layer.double_quant) for size, layer in zip(sizes, linears, strict=True)
    ]
    codes = {id(layer.weight) for layer in linears}
    constants = {
        id(tensor) for layer in linears for tensor in (layer.absmax, layer.nested_absmax) if tensor is not None
    }
    frozen = {
        name: parameter
        for name, parameter in base.named_parameters()
        if not parameter.requires_grad and id(parameter) not in codes
    }
    remainder = [_loaded_bytes(base, name, parameter) for name, parameter in frozen.items()]
    buffers = [buffer.nbytes for buffer in base.buffers() if id(buffer) not in constants]
    in_16_bits = [size * layer.compute_dtype.itemsize for size, layer in zip(sizes, linears, strict=True)]
    text = base.config.get_text_config()
    return Inventory(
        parameters=sum(sizes) + sum(parameter.numel() for parameter in frozen.values()),
        quantized_parameters=sum(sizes),
        quantized_bytes=sum(in_4_bits),
        remainder_bytes=sum(remainder) + sum(buffers),
        largest_tensor_bytes=max(remainder + in_16_bits, default=0),
        adapter_sizes=tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
    )


def count_mapped_bytes(model_name_or_path: str, outline: PeftModel) -> int:
    """Bytes of the model that are pages of its files once it is loaded on the CPU: those of a 4-bit checkpoint.

    Taken for granted is that the file's tensors begin where their types can be read.
    """
    config = read_config(locate(model_name_or_path, with_weights=False))
    if getattr(config, "quantization_config", None) is None:
        return 0
    linears = [module for module in outline.modules() if isinstance(module, Linear4bit)]
    codes = {id(layer.weight) for layer in linears}
    sizes = []
    for layer in linears:
        n = layer.in_features * layer.out_features
        blocks = formats.block_count(n, layer.block_size)
        sizes += [formats.packed_bytes(n), blocks if layer.double_quant else 4 * blocks]
    for parameter in outline.get_base_model().parameters():
        if not parameter.requires_grad and id(parameter) not in codes and parameter.ndim > 1:
            sizes.append(parameter.nbytes if parameter.dtype == config.dtype else 0)
    return sum(size for size in sizes if size >= LARGE_BYTES)


def _loaded_bytes(model: Any, name: str, parameter: Tensor) -> int:
    """What a parameter takes once loaded: transformers keeps some in float32, whatever is asked for."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if parameter.dtype.itemsize == 2 and any(re.search(rf"(^|\.){re.escape(key)}(\.|$)", name) for key in wide):
        return 4 * parameter.numel()
    return parameter.nbytes


# ── Layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def decoder_layers(model: PeftModel) -> nn.ModuleList | None:
    """The list of layers that the model's configuration counts; None where there is none to be found."""
    base = model.get_base_model()
    count = base.config.get_text_config().num_hidden_layers
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return next((found for found in lists if next(found.parameters(), None) is not None), None)


def kinds_of_layers(model: PeftModel) -> list[list[int]]:
    """The places of layers that are alike: of the same tensors, trained or not, and of the same attention."""
    layers = decoder_layers(model)
    if layers is None:
        return []
    types = getattr(model.get_base_model().config.get_text_config(), "layer_types", None)
    kinds: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        tensors = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        kind = type(layer), tensors, types[place] if isinstance(types, list | tuple) and place < len(types) else None
        kinds.setdefault(kind, []).append(place)
    return list(kinds.values())


def values_a_layer(model: PeftModel, place: int) -> int:
    """Values of the base model's that a token is multiplied with in a layer, more or less."""
    layers = decoder_layers(model)
    assert layers is not None
    linear = sum(m.in_features * m.out_features for m in layers[place].modules() if isinstance(m, Linear4bit))
    rest = sum(math.prod(p.shape) for p in layers[place].parameters() if p.is_floating_point())
    return linear + rest
