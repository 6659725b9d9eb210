"""A base model's weights one at a time: as they stand in its files, and as training in 4 bits saw them.

Nothing is read before it is asked for, so whoever goes through a model tensor by tensor has memory for one. Names are
told in both ways: transformers' own renamings lead from a file's names to the model's, and where it does more than
rename (experts that are fused into one parameter) a tensor of the file has no one parameter, and is nobody's but its
file's. A .gguf file is the exception: it is dequantized as a whole, and memory holds the model in 16 bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.load import build_on_meta, load_model
from halfbyte.huggingface.quantizer import QuantizationConfig, Quantizer
from halfbyte.huggingface.read_ahead import ReadAhead
from halfbyte.huggingface.safetensors_files import read_safetensors
from halfbyte.huggingface.source import Source, locate, read_config, reason
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantizedTensor, from_keys, quantize_4bit


@dataclass(frozen=True)
class BaseWeights:
    """A base model without its numbers, and where they are."""

    source: Source
    config: PreTrainedConfig
    model: PreTrainedModel  # on the meta device, nothing of it in 4 bits
    layout: "FourBitLayout"  # what is in 4 bits in training
    file_names: dict[str, str]  # the model's name of a tensor -> its files'; tied parameters under one of theirs
    unnamed: list[str]  # tensors of the files that are not one parameter of the model
    tied: dict[str, list[str]]  # a parameter that is another one as well -> all names that it has
    is_quantized: bool  # the files hold 4-bit codes
    _tensors: dict[str, Any] = field(repr=False)
    _constants: dict[str, dict[str, str]] = field(repr=False)  # a 4-bit weight's file name -> suffix -> file name
    _ahead: ReadAhead | None = field(repr=False, default=None)

    def file_name(self, name: str) -> str | None:
        """The file's name of a parameter, a tied one's by any of its names; None where the files do not have it."""
        return next((self.file_names[n] for n in self.tied.get(name, [name]) if n in self.file_names), None)

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
        file_name = self._existing(name)
        if self.is_4bit(file_name):
            raise HalfbyteError(f"{self.source.path}: {name} is in 4 bits, and its 16-bit original is not there.")
        tensor = self.read(file_name)
        self._check_shape(name, tuple(tensor.shape))
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise HalfbyteError(f"{self.source.path}: {name} holds a NaN or an infinity.")
        return tensor

    def quantized(self, name: str) -> QuantizedTensor:
        """The (out, in) weight of a layer that is in 4 bits in training, bit for bit as it is there.

        Raises:
            HalfbyteError: a weight that holds NaN or infinity; codes or constants that are not the format's.
        """
        file_name = self._existing(name)
        if self.is_4bit(file_name):
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
            own = [f"{module_name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)]
            yield module_name, own

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
    unnamed: list[str] = []
    constants: dict[str, dict[str, str]] = {}
    ahead = None
    if source.gguf_file:
        tensors: dict[str, Any] = _dequantized_gguf(model_name_or_path, compute_dtype, tied)
        file_names = {name: name for name in tensors}
    else:
        tensors = read_safetensors(source.directory)
        ahead = ReadAhead(source.directory)
        constants = _constants(tensors)
        file_names, unnamed = _model_names(model, [name for name in tensors if not _is_constant(name, constants)])
    base = BaseWeights(
        source, config, model, layout, file_names, unnamed, tied, bool(constants), tensors, constants, ahead
    )
    converted = bool(unnamed)  # what the model fuses has other names than the files'
    missing = [name for name, _ in model.named_parameters() if base.file_name(name) is None]
    if missing and not converted:
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
    layers = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    return FourBitLayout(settings, frozenset(layers), frozenset(quantizer.transposed))


def _model_names(model: PreTrainedModel, file_names: list[str]) -> tuple[dict[str, str], list[str]]:
    """The model's name of each tensor, to its files', and the tensors that are not one parameter or buffer of it."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    named: dict[str, str] = {}
    unnamed = []
    for file_name in sorted(file_names):
        rules: tuple[Any, Any] = (renamings, converters)
        name, converter = rename_source_key(file_name, *rules, model.base_model_prefix, known)
        if name not in known and file_name in known:
            name, converter = file_name, None
        if converter is None and name in known:
            named[name] = file_name
        else:
            unnamed.append(file_name)
    return named, unnamed


def _constants(tensors: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The tensors that stand beside each 4-bit weight, by the weight's name and their suffix."""
    weights = {name.removesuffix(".quant_map") for name in tensors if name.endswith(".quant_map")} & tensors.keys()
    found: dict[str, dict[str, str]] = {weight: {} for weight in weights}
    for name in tensors:
        weight, dot, suffix = name.partition(".weight.")
        if dot and f"{weight}.weight" in found:
            found[f"{weight}.weight"][suffix] = name
    return found


def _is_constant(name: str, constants: dict[str, dict[str, str]]) -> bool:
    weight, dot, _ = name.partition(".weight.")
    return bool(dot) and f"{weight}.weight" in constants


def _dequantized_gguf(model_name_or_path: str, dtype: torch.dtype, tied: dict[str, list[str]]) -> dict[str, Any]:
    model, _ = load_model(model_name_or_path, "none", compute_dtype=dtype, fast=False)
    tensors = dict(model.state_dict())
    for name, names in tied.items():
        if name != names[0]:
            tensors.pop(name, None)
    return tensors
