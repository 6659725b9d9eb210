"""A base model's weights one at a time: as they stand in its files, and as training in 4 bits saw them.

Nothing is read before it is asked for, so whoever goes through a model tensor by tensor has memory for one. Parameters
go by the model's names, and what is to be written by the files' (halfbyte.huggingface.conversions): a mixture's experts
are one parameter here, as in training, and many tensors there. A .gguf file is the exception: it is dequantized as a
whole, and memory holds the model in 16 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.conversions import Conversions
from halfbyte.huggingface.load import build_on_meta, load_model
from halfbyte.huggingface.quantizer import QuantizationConfig, Quantizer
from halfbyte.huggingface.read_ahead import ReadAhead
from halfbyte.huggingface.safetensors_files import read_safetensors
from halfbyte.huggingface.source import Source, locate, read_config, reason
from halfbyte.nn import PackedWeights
from halfbyte.quant import QuantizedTensor, from_keys, quantize_4bit


@dataclass(frozen=True)
class BaseWeights:
    """A base model without its numbers, and where they are."""

    source: Source
    config: PreTrainedConfig
    model: PreTrainedModel  # on the meta device, nothing of it in 4 bits
    layout: "FourBitLayout"  # what is in 4 bits in training
    file_names: dict[str, str]  # the model's name of a tensor -> its files'; tied parameters under one of theirs
    conversions: Conversions  # of what is not one tensor there and here
    tied: dict[str, list[str]]  # a parameter that is another one as well -> all names that it has
    is_quantized: bool  # the files hold 4-bit codes
    _tensors: dict[str, Any] = field(repr=False)
    _constants: dict[str, dict[str, str]] = field(repr=False)  # a 4-bit weight's file name -> suffix -> file name
    _ahead: ReadAhead | None = field(repr=False, default=None)

    def file_name(self, name: str) -> str | None:
        """The file's name of a parameter, a tied one's by any of its names; None where the files do not have it."""
        return next((self.file_names[n] for n in self.tied.get(name, [name]) if n in self.file_names), None)

    def has(self, name: str) -> bool:
        """Whether a parameter can be read, from one tensor of the files or from several."""
        return name in self.conversions.parts or self.file_name(name) is not None

    def take_apart(self, name: str, tensor: Tensor, whole_name: str) -> dict[str, Tensor]:
        """A parameter in 16 bits as the files of such a model have it: its tensors there, by their names.

        Args:
            whole_name: where it is one tensor.

        Raises:
            HalfbyteError: transformers takes it apart into others than it was made of.
        """
        file_name = self.file_name(name)
        is_whole = file_name is not None and not self.is_4bit(file_name)
        if is_whole or not self.conversions.fuses(name):
            return {whole_name: tensor}
        apart = self.conversions.take_apart(name, tensor)
        expected = self._parts(name) or apart
        if set(apart) != set(expected):
            raise HalfbyteError(
                f"{self.source.path}: {name} is made of {min(expected)} and others, and cannot be taken apart into"
                " them; this model cannot be merged."
            )
        return apart

    def read(self, file_name: str) -> Tensor:
        """A tensor of the files, as it stands there.  Raises HalfbyteError where it cannot be read."""
        if self._ahead is not None:
            self._ahead.reached(file_name)
        try:
            tensor: Tensor = self._tensors[file_name][...]
        except (SafetensorError, OSError, ValueError) as error:
            raise HalfbyteError(f"{self.source.path}: {file_name} cannot be read ({reason(error)}).") from error
        return tensor

    def is_4bit(self, file_name: str) -> bool:
        """Whether the files hold the tensor as 4-bit codes."""
        return file_name in self._constants

    def original(self, name: str) -> Tensor:
        """A parameter in the shape and dtype of its file, from before any quantization."""
        if name in self.conversions.parts:
            tensor = self._fused(name)
        else:
            file_name = self._existing(name)
            if self.is_4bit(file_name):
                raise HalfbyteError(f"{self.source.path}: {name} is in 4 bits, and its 16-bit original is not there.")
            tensor = self.read(file_name)
        self._check_shape(name, tuple(tensor.shape))
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise HalfbyteError(f"{self.source.path}: {name} holds a NaN or an infinity.")
        return tensor

    def quantized(self, name: str) -> QuantizedTensor:
        """A weight that is in 4 bits in training, bit for bit as it is there: `(out, in)`, or three dimensions.

        Raises:
            HalfbyteError: a weight that holds NaN or infinity; codes or constants that are not the format's.
        """
        file_name = self.file_name(name)
        if file_name is not None and self.is_4bit(file_name):
            constants = {suffix: self.read(place) for suffix, place in self._constants[file_name].items()}
            quantized = from_keys(file_name, self.read(file_name), constants)
            shape = tuple(quantized.shape)
            self._check_shape(name, shape[::-1] if name in self.layout.transposed else shape)
            return quantized
        settings = self.layout.settings
        assert settings is not None, "the layer was said to be in 4 bits"
        weight = self.original(name).to(settings.compute_dtype)
        try:
            return quantize_4bit(
                weight.T if name in self.layout.transposed else weight,
                settings.quant_type,
                settings.block_size,
                settings.double_quant,
            )
        except HalfbyteError as error:
            raise HalfbyteError(f"{self.source.path}: {name}: {error}") from error

    def modules_in_order(self) -> Iterator[tuple[str, list[str]]]:
        """Modules in the order in which fingerprints are made, and the names of each one's own parameters."""
        for module_name, module in sorted(self.model.named_modules(), key=lambda item: item[0]):
            leaves = self.layout.parameters.get(module_name) or [n for n, _ in module.named_parameters(recurse=False)]
            yield module_name, [f"{module_name}.{leaf}".lstrip(".") for leaf in leaves]

    def _parts(self, name: str) -> list[str]:
        return [file_name for each in self.conversions.parts.get(name, {}).values() for file_name in each]

    def _fused(self, name: str) -> Tensor:
        for file_name in self._parts(name):
            if self.is_4bit(file_name):
                raise HalfbyteError(
                    f"{self.source.path}: {file_name} is in 4 bits and is a part of a parameter that the model fuses;"
                    " name the 16-bit original of the model."
                )
        try:
            return self.conversions.fuse(name, self.read)
        except (RuntimeError, ValueError) as error:
            raise HalfbyteError(
                f"{self.source.path}: {name} cannot be made of {self._parts(name)[0]} and others ({reason(error)});"
                " fetch the model again."
            ) from error

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = tuple(self.model.get_parameter(name).shape)
        if shape != expected:
            raise HalfbyteError(f"{self.source.path}: {name} is {shape} where the model's config asks for {expected}.")

    def _existing(self, name: str) -> str:
        file_name = self.file_name(name)
        if file_name is None:
            raise HalfbyteError(f"{self.source.path} lacks the model's tensor {name}; fetch it again.")
        return file_name


@dataclass(frozen=True)
class FourBitLayout:
    """Which layers a model has in 4 bits, and how."""

    settings: QuantizationConfig | None  # None: nothing is
    layers: frozenset[str] = frozenset()  # names of weights
    transposed: frozenset[str] = frozenset()  # those that the files hold as (in, out), as GPT-2's
    parameters: dict[str, list[str]] = field(default_factory=dict)  # of a layer, by its name, in the order that it has


def open_base(model_name_or_path: str, settings: QuantizationConfig | None) -> BaseWeights:
    """Find a model's tensors; `settings` say how training quantized it, and are not looked at for a 4-bit checkpoint.

    Raises:
        HalfbyteError: no such model, an unknown architecture, a missing or broken file, a missing tensor.
    """
    source = locate(model_name_or_path)
    config = read_config(source)
    saved = getattr(config, "quantization_config", None)
    compute_dtype = torch.bfloat16 if settings is None else settings.compute_dtype
    if saved is not None:
        settings = QuantizationConfig.from_bitsandbytes(saved, compute_dtype)
    model = build_on_meta(source, config, compute_dtype)
    layout = four_bit_layout(source, config, settings, pre_quantized=saved is not None)
    parameters: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in parameters.values() if len(names) > 1 for name in names}
    constants: dict[str, dict[str, str]] = {}
    ahead = None
    if source.gguf_file:
        tensors: dict[str, Any] = _dequantized_gguf(model_name_or_path, compute_dtype, tied)
    else:
        tensors = read_safetensors(source.directory)
        ahead = ReadAhead(source.directory)
        constants = _constants(tensors)
    beside = {place for places in constants.values() for place in places.values()}
    conversions = Conversions(model, () if source.gguf_file else tensors.keys() - beside)
    named = {name: name for name in tensors} if source.gguf_file else conversions.named
    base = BaseWeights(
        source, config, model, layout, named, conversions, tied, bool(constants), tensors, constants, ahead
    )
    several = {name for names in conversions.several.values() for name in names}
    missing = [name for name, _ in model.named_parameters() if not base.has(name) and name not in several]
    for name in conversions.parts:
        missing += sorted(conversions.take_apart(name, model.get_parameter(name)).keys() - tensors.keys())
    if missing:
        raise HalfbyteError(f"{source.path} lacks {len(missing)} of the model's tensors, among them {missing[0]}.")
    return base


def four_bit_layout(
    source: Source, config: PreTrainedConfig, settings: QuantizationConfig | None, pre_quantized: bool = False
) -> FourBitLayout:
    """What the quantizer of a load would have in 4 bits; it also fills in the settings' `skip_modules`."""
    if settings is None:
        return FourBitLayout(None)
    model = build_on_meta(source, config, settings.compute_dtype)
    quantizer = Quantizer(settings, pre_quantized=pre_quantized)
    quantizer._process_model_before_weight_loading(model)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeights)}
    layers = [f"{name}.{weight}" for name, module in packed.items() for weight in module.shapes]
    parameters = {name: [n for n, _ in module.named_parameters(recurse=False)] for name, module in packed.items()}
    return FourBitLayout(settings, frozenset(layers), frozenset(quantizer.transposed), parameters)


def _constants(tensors: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The tensors that stand beside each 4-bit weight, by the weight's name and their suffix."""
    weights = {name.removesuffix(".quant_map") for name in tensors if name.endswith(".quant_map")} & tensors.keys()
    found: dict[str, dict[str, str]] = {weight: {} for weight in weights}
    for name in tensors:
        weight = name.rpartition(".")[0].removesuffix(".quant_state")
        if weight in found:
            found[weight][name.removeprefix(f"{weight}.")] = name
    return found


def _dequantized_gguf(model_name_or_path: str, dtype: torch.dtype, tied: dict[str, list[str]]) -> dict[str, Any]:
    model, _ = load_model(model_name_or_path, "none", compute_dtype=dtype, fast=False)
    tensors = dict(model.state_dict())
    for name, names in tied.items():
        if name != names[0]:
            tensors.pop(name, None)
    return tensors
