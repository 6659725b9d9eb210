"""Where transformers and PEFT have no seam: five functions of theirs, wrapped for models with layers in 4 bits.

| function | so that |
| --- | --- |
| `LoraModel.inject_adapter` | PEFT's own `get_peft_model`, `add_adapter` and `from_pretrained` put our LoRA layers on |
| `PeftModel.get_nb_trainable_parameters` | `print_trainable_parameters` counts weights and not bytes of codes |
| `PreTrainedModel.num_parameters` | so does transformers |
| `PreTrainedModel.resize_token_embeddings` | new tokens are not made of codes: refused where the table is in 4 bits |
| `AutoHfQuantizer.merge_quantization_configs` | our configuration may open a checkpoint that says bitsandbytes |

PEFT has a registry of custom layers, but on each configuration, which a user makes. All five do what they did for a
model without such layers, and are looked up on their classes, so it does not matter who was imported first.
docs/decisions/0016 has what else was considered.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.initial import initialize_loftq
from halfbyte.huggingface.peft import LoraLinear4bit, share_inputs
from halfbyte.huggingface.peft_embedding import LoraEmbedding4bit
from halfbyte.huggingface.peft_experts import LoraExperts4bit
from halfbyte.huggingface.quantizer import QuantizationConfig, Quantizer
from halfbyte.nn import Embedding4bit, Experts4bit, Linear4bit, PackedWeights

_MARK = "halfbyte_wraps"
_LORA_LAYERS = {Linear4bit: LoraLinear4bit, Embedding4bit: LoraEmbedding4bit, Experts4bit: LoraExperts4bit}


def install() -> None:
    """Wrap the five functions, once."""
    _wrap(LoraModel, "inject_adapter", _inject_adapter)
    _wrap(PeftModel, "get_nb_trainable_parameters", _get_nb_trainable_parameters)
    _wrap(PreTrainedModel, "num_parameters", _num_parameters)
    _wrap(PreTrainedModel, "resize_token_embeddings", _resize_token_embeddings)
    _wrap(AutoHfQuantizer, "merge_quantization_configs", _merge_quantization_configs, kind=staticmethod)


def _wrap(owner: type, name: str, around: Callable[..., Any], kind: Callable[..., Any] = lambda f: f) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, kind(wrapped))


def _inject_adapter(
    original: Callable[..., None], tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    if type(tuner) is not LoraModel or not _layers_of(model, PackedWeights):
        original(tuner, model, adapter_name, *args, **kwargs)
        return
    config = tuner.peft_config[adapter_name]
    config._register_custom_module(_LORA_LAYERS)
    _check_whole_layers(model, config)
    restore_dtypes(model)
    original(tuner, model, adapter_name, *args, **kwargs)
    if next(model.parameters()).is_meta:
        return  # an outline: no numbers to begin with, and nothing can be run
    if config.init_lora_weights == "loftq":
        layers = _layers_of(model, LoraLinear4bit)
        adapted = {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}
        initialize_loftq(model, adapted, adapter_name, config)
    share_inputs(model)


def _get_nb_trainable_parameters(original: Callable[..., Any], model: Any) -> tuple[int, int]:
    trainable, total = original(model)
    return trainable, total + _uncounted(model)


def _num_parameters(
    original: Callable[..., int], model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    counted = original(model, only_trainable, exclude_embeddings)
    return counted if only_trainable else counted + _uncounted(model)


def _resize_token_embeddings(
    original: Callable[..., Any], model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_new = args or kwargs or (new_num_tokens is not None and new_num_tokens != table.num_embeddings)
    if is_new and any(isinstance(getattr(m, "base_layer", m), PackedWeights) for m in (table, head)):
        raise HalfbyteError(
            "Tokens cannot be added where the embedding or the output layer is in 4 bits;"
            " load the model without quantize_embeddings and quantize_output_layer."
        )
    return original(model, new_num_tokens, *args, **kwargs)


def _merge_quantization_configs(original: Callable[..., Any], saved: Any, given: Any = None) -> Any:
    if not isinstance(given, QuantizationConfig):
        return original(saved, given)
    read = QuantizationConfig.from_bitsandbytes(saved if isinstance(saved, dict) else saved.to_dict(), torch.bfloat16)
    read.compute_dtype, read.fast = given.compute_dtype, given.fast
    return read


def _check_whole_layers(model: nn.Module, config: Any) -> None:
    """Raises HalfbyteError where a layer in 4 bits is to be trained as a whole, or rows of one."""
    whole = list(config.modules_to_save or [])
    rows = config.trainable_token_indices
    whole += list(rows) if isinstance(rows, dict) else ["embed_tokens"] if rows else []
    for name, module in model.named_modules():
        ends = [key for key in whole if name == key or name.endswith(f".{key}")]
        if ends and any(isinstance(inner, PackedWeights) for inner in module.modules()):
            raise HalfbyteError(f"{name} is in 4 bits, so that it can have an adapter, and cannot be trained itself.")


def restore_dtypes(model: nn.Module) -> None:
    """Give parameters the dtype back that they were loaded in, where that loses nothing.

    `peft.prepare_model_for_kbit_training` makes float32 of all that is in 16 bits: embeddings and the output layer
    twice as large, and a slower product, for the same numbers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Quantizer):
        return
    for name, parameter in model.named_parameters():
        dtype = quantizer.loaded_dtypes.get(name, parameter.dtype)
        if parameter.dtype == torch.float32 and dtype != torch.float32:
            narrow = parameter.detach().to(dtype)
            if torch.equal(narrow.float(), parameter):
                parameter.data = narrow


def _uncounted(model: nn.Module) -> int:
    """Weights that share a byte with another."""
    layers = [layer for layer in _layers_of(model, PackedWeights).values() if not layer.is_tied]
    shapes = [(getattr(layer, name), shape) for layer in layers for name, shape in layer.shapes.items()]
    return sum(shape.numel() - codes.numel() for codes, shape in shapes)


def _layers_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}
