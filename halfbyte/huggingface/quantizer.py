"""transformers' quantizer seam: linear layers become Linear4bit on the meta device, then each tensor is
quantized as it is read, or, from a 4-bit checkpoint, taken as it is.

transformers walks the checkpoint tensor by tensor and applies a model's own conversions (renamed keys,
fused experts) before it asks a quantizer, so any causal language model that it knows can be loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.experts import computes_the_same, replace_experts, warn_of_wide_experts, weights_of_experts
from halfbyte.huggingface.patch import accelerate_model
from halfbyte.nn import Embedding4bit, Experts4bit, Linear4bit, PackedWeights
from halfbyte.quant import from_keys, quantize_4bit

QUANT_METHOD = "halfbyte"
# What is replaced. Other subclasses of nn.Linear compute something else; Falcon's differs in its rounding alone.
_LINEAR = (nn.Linear, FalconLinear)
# In config.json, beside bitsandbytes' keys, which have none for them.
_EXPERTS_KEY, _EMBEDDINGS_KEY = "halfbyte_experts_4bit", "halfbyte_embeddings_4bit"
_conversion_errors: ContextVar[list[HalfbyteError] | None] = ContextVar("conversion_errors", default=None)


@register_quantization_config(QUANT_METHOD)
class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`from_pretrained(path, quantization_config=QuantizationConfig(quant_type="nf4"))`.

    Args:
        quant_type: `nf4`, `fp4` or `int4`.
        block_size: values that share one absmax; a power of two, 32 to 4096.
        double_quant: store the absmax in 8 bits.
        compute_dtype: the dtype of the products.
        skip_modules: names of linear layers that stay in 16 bits; the output layer and tied ones always do.
        fast: halfbyte's operations in place of the model's own where they compute the same, as for `load_model`.
        quantize_embeddings: the table of the input's tokens, too; bitsandbytes does not open such a checkpoint.
        quantize_output_layer: the output layer, too. Where the two are one tensor, both or neither.
        experts: set by loading, and read from a checkpoint: a mixture's experts are in 4 bits, too.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str = torch.bfloat16,
        skip_modules: list[str] | None = None,
        fast: bool = True,
        quantize_embeddings: bool = False,
        quantize_output_layer: bool = False,
        experts: bool = False,
        **_: Any,  # from_dict passes quant_method
    ) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.compute_dtype = getattr(torch, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
        self.skip_modules = skip_modules
        self.fast = fast
        self.quantize_embeddings = quantize_embeddings
        self.quantize_output_layer = quantize_output_layer  # in a checkpoint, what it skips says so
        self.experts = experts
        # How the tensors' names and values become the model's, where it is not by the model's own rules (GGUF).
        self.conversions: list[Any] | None = None

    @classmethod
    def from_bitsandbytes(cls, saved: dict[str, Any], compute_dtype: torch.dtype) -> "QuantizationConfig":
        """From the `quantization_config` of a 4-bit checkpoint's config.json.

        Raises:
            HalfbyteError: another method than bitsandbytes in 4 bits.
        """
        method = saved.get("quant_method")
        if method not in ("bitsandbytes", None) or not saved.get("load_in_4bit"):
            raise HalfbyteError(
                f"config.json: the model is quantized by {method!r} in a way that is not read; use its 16-bit original."
            )
        return cls(
            quant_type=saved.get("bnb_4bit_quant_type", "fp4"),
            double_quant=saved.get("bnb_4bit_use_double_quant", False),
            compute_dtype=compute_dtype,
            skip_modules=saved.get("llm_int8_skip_modules"),
            quantize_embeddings=saved.get(_EMBEDDINGS_KEY) is True,
            experts=saved.get(_EXPERTS_KEY) is True,
        )

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json: bitsandbytes' keys, since the bytes are its format."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.skip_modules,
            **({_EXPERTS_KEY: True} if self.experts else {}),
            **({_EMBEDDINGS_KEY: True} if self.quantize_embeddings else {}),
        }


@register_quantizer(QUANT_METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """Drives QuantizationConfig through `from_pretrained`."""

    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": [
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
            "weight.quant_state.bitsandbytes__int4",
        ]
    }
    quantized_element_size = 0.5
    is_trainable = True

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.transposed: set[str] = set()  # weights that the checkpoint holds as (in, out), as GPT-2's
        self.loaded_dtypes: dict[str, torch.dtype] = {}  # of parameters that are numbers

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module_name, _dot, leaf = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        return isinstance(module, PackedWeights) and leaf in module.shapes

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # A saved checkpoint's list is the whole list, as bitsandbytes has it; one that a caller gives comes on top of
        # the output layer, the tied ones, and what stands on the model for a task, which is trained anew.
        own = not self.pre_quantized
        keep = self.get_modules_to_not_convert(
            model, self.config.skip_modules, model._keep_in_fp32_modules, add_default_skips=own
        )
        if own:
            heads = [name for name in _heads(model) if should_convert_module(name, keep)]
            asked = self._asked_for(model)
            keep = [name for name in keep + heads if name not in asked]
            if heads or asked or self.config.skip_modules is not None:
                self.config.skip_modules = sorted(keep)
        table = model.get_input_embeddings() if self.config.quantize_embeddings else None
        for name, module in list(model.named_modules()):
            if not should_convert_module(name, keep):
                continue
            if weights_of_experts(module):
                self._replace_experts(model, name, module)
                continue
            if module is table:
                model.set_submodule(name, _empty_embedding(table, self.config))
                continue
            if isinstance(module, Conv1D):
                self.transposed.add(f"{name}.weight")
                in_features, out_features = module.weight.shape
            elif type(module) in _LINEAR:
                out_features, in_features = module.weight.shape
            else:
                continue
            has_bias = module.bias is not None
            model.set_submodule(name, _empty_layer(in_features, out_features, has_bias, self.config, model.dtype))
        if own or self.config.experts:
            warn_of_wide_experts(model)
        _tie_output_layer(model)

    def _asked_for(self, model: PreTrainedModel) -> set[str]:
        """The names of the embedding and of the output layer, as far as they are to be in 4 bits."""
        names = {id(module): name for name, module in model.named_modules()}
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        wanted = self.config.quantize_embeddings, self.config.quantize_output_layer
        if wanted[0] != wanted[1] and head is not None and _is_one(model, names[id(head)]):
            raise HalfbyteError(
                "The embedding and the output layer of this model are one tensor;"
                " set both quantize_embeddings and quantize_output_layer, or neither."
            )
        found = (module for module, is_wanted in zip((table, head), wanted, strict=True) if is_wanted)
        return {names[id(module)] for module in found if module is not None}

    def _replace_experts(self, model: PreTrainedModel, name: str, module: nn.Module) -> None:
        if not self.pre_quantized:
            if not computes_the_same(module):
                return  # told with all that stays as it is
            self.config.experts = True
        if self.config.experts:
            config = self.config
            experts = replace_experts(
                module,
                quant_type=config.quant_type,
                block_size=config.block_size,
                double_quant=config.double_quant,
                compute_dtype=config.compute_dtype,
                device="meta",
            )
            experts.__dict__["_is_hf_initialized"] = True
            model.set_submodule(name, experts)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # Saving reverses a model's conversions. Ours are already undone by the state dicts, and what put experts
        # together cannot take their codes apart.
        own = (Quantize, Deserialize)
        packed = set(_weights_of_experts(model))
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions or []
            if not any(isinstance(operation, own) for operation in getattr(conversion, "operations", ()))
            and not (isinstance(conversion, WeightConverter) and _targets(conversion, packed))
        ]
        if self.config.conversions is not None:
            model._weight_conversions = None
        _tie_output_layer(model)
        table = model.get_input_embeddings()
        if isinstance(table, Embedding4bit) and table._non_persistent_buffers_set:
            # transformers makes a class's buffers anew when it has loaded it, and does not know this one.
            model._init_weights(table.as_kind(torch.zeros(1, table.embedding_dim)))
        parameters = model.named_parameters()
        self.loaded_dtypes = {name: tensor.dtype for name, tensor in parameters if tensor.is_floating_point()}
        if self.config.fast:
            accelerate_model(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        if self.config.conversions is not None:
            return self.config.conversions
        converted: list[Any] = super().update_weight_conversions(weight_conversions, model)
        if self.pre_quantized:
            (suffixes,) = ([name.removeprefix("weight") for name in names] for names in self.serialized_names.values())
            for name in _weights_of_experts(model):
                converted.insert(0, WeightConverter([name + suffix for suffix in suffixes], name, [Deserialize(self)]))
        return converted

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Deserialize}


class Quantize(ConversionOps):  # type: ignore[misc]
    """A 16-bit weight, just read, into its layer."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **_: Any) -> dict[str, Tensor]:
        assert model is not None
        config = self.hf_quantizer.config
        converted: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            module_name, _dot, leaf = name.rpartition(".")
            layer = model.get_submodule(module_name)
            weight = _only(value)
            if name in self.hf_quantizer.transposed:
                weight = weight.T
            with _reported(name):
                _check_shape(weight.shape, layer, leaf)
                quantized = quantize_4bit(weight, config.quant_type, config.block_size, config.double_quant)
                layer.set_quantized(leaf, quantized)
            converted[name] = getattr(layer, leaf)
        return converted


class Deserialize(ConversionOps):  # type: ignore[misc]
    """A 4-bit weight and its constants, as they stand in the checkpoint, into their layer."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel | None = None,
        full_layer_name: str | None = None,
        target_patterns: list[str] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        assert model is not None
        assert full_layer_name is not None
        assert target_patterns
        module_name, _dot, leaf = full_layer_name.rpartition(".")
        layer = model.get_submodule(module_name)
        stem = target_patterns[0]  # `weight`, or experts' own names
        keys = {key.removeprefix(stem).removeprefix("."): _only(value) for key, value in input_dict.items()}
        with _reported(full_layer_name):
            packed = keys.pop("", None)
            if packed is None:
                raise HalfbyteError("the codes are missing, though their constants are there.")
            if not isinstance(layer, PackedWeights):
                if keys:
                    raise HalfbyteError("the weight is in 4 bits, and config.json says that it is not.")
                return input_dict
            if not keys:
                raise HalfbyteError("the weight has no constants beside it, and config.json says that it is in 4 bits.")
            quantized = from_keys(full_layer_name, packed, keys)
            _check_shape(quantized.shape, layer, leaf)
            layer.set_quantized(leaf, quantized)
        return {stem: getattr(layer, leaf)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Deserialize(self.hf_quantizer)

    def __deepcopy__(self, _: Any) -> "Deserialize":
        # transformers copies a conversion for every tensor, a thousand in a small model: the quantizer need not be.
        return self


def _empty_layer(
    in_features: int, out_features: int, bias: bool, config: QuantizationConfig, dtype: torch.dtype
) -> Linear4bit:
    layer = Linear4bit(
        in_features,
        out_features,
        bias,
        quant_type=config.quant_type,
        block_size=config.block_size,
        double_quant=config.double_quant,
        compute_dtype=config.compute_dtype,
        device="meta",
    )
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    layer.__dict__["_is_hf_initialized"] = True  # or transformers draws random numbers into the codes
    return layer


def _empty_embedding(table: nn.Embedding, config: QuantizationConfig) -> Embedding4bit:
    embedding = Embedding4bit(
        table.num_embeddings,
        table.embedding_dim,
        table.padding_idx,
        kind=type(table),
        quant_type=config.quant_type,
        block_size=config.block_size,
        double_quant=config.double_quant,
        compute_dtype=config.compute_dtype,
        device="meta",
    )
    own = vars(embedding)
    for name, value in vars(table).items():
        own.setdefault(name, value)
    embedding._buffers.update(table._buffers)  # a scale, in classes that have one
    embedding._non_persistent_buffers_set |= table._non_persistent_buffers_set
    own["_is_hf_initialized"] = True
    return embedding


def _only(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


@contextmanager
def first_conversion_error() -> Iterator[None]:
    """Raise the first of our errors: transformers only logs one inside a conversion, and goes on."""
    errors: list[HalfbyteError] = []
    token = _conversion_errors.set(errors)
    try:
        yield
    except Exception:
        if not errors:
            raise
    finally:
        _conversion_errors.reset(token)
    if errors:
        raise errors[0]


@contextmanager
def _reported(name: str) -> Iterator[None]:
    """Name the tensor in an error of ours, and keep the error for `first_conversion_error`."""
    try:
        yield
    except HalfbyteError as error:
        named = error if name in str(error) else HalfbyteError(f"{name}: {error}")
        errors = _conversion_errors.get()
        if errors is not None:
            errors.append(named)
        raise named from error


def _check_shape(shape: torch.Size, layer: PackedWeights, name: str) -> None:
    expected = layer.shapes[name]
    if shape != expected:
        raise HalfbyteError(f"the weight is {tuple(shape)} where config.json asks for {tuple(expected)}.")


def _is_one(model: PreTrainedModel, output_layer: str) -> bool:
    """Whether the output layer's weight is another's."""
    return f"{output_layer}.weight" in model.all_tied_weights_keys


def _tie_output_layer(model: PreTrainedModel) -> None:
    """Where embedding and output layer are one tensor, and that is in 4 bits, its constants are one as well."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, Embedding4bit) and isinstance(head, Linear4bit):
        names = {id(module): name for name, module in model.named_modules()}
        if _is_one(model, names[id(head)]):
            head.tie(table)


def _heads(model: PreTrainedModel) -> list[str]:
    """The linear layers that stand on the model proper: those of a classifier, however it calls them."""
    if model.base_model is model:
        return []
    within = f"{model.base_model_prefix}."
    linears = [name for name, module in model.named_modules() if type(module) in _LINEAR]
    return [name for name in linears if not name.startswith(within)]


def _weights_of_experts(model: nn.Module) -> list[str]:
    """`experts.gate_up_proj` and such: the ends of the names of experts' weights."""
    found = {
        f"{name.rpartition('.')[2]}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, Experts4bit)
        for weight in module.shapes
    }
    return sorted(found)


def _targets(conversion: WeightConverter, names: set[str]) -> bool:
    """Whether the conversion makes a weight of one of these names."""
    return any(f".{pattern}".endswith(f".{name}") for pattern in conversion.target_patterns for name in names)
