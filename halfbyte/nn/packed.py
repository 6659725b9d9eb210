"""What modules have in common whose weights are packed codes: a linear layer, an embedding, a mixture's experts.

A weight is a parameter, `((n+1)//2, 1)` uint8, that takes no gradient; its absmax, and of a double-quantized one what
scales those, are buffers beside it. They follow the codes from device to device and never change dtype. A state dict
has them under bitsandbytes' keys (halfbyte.quant.keys), the weight's own name first.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant import DoubleQuantized, QuantizedTensor, from_keys, to_keys


class PackedWeights(nn.Module):
    """A module with weights in 4 bits, all of one type, block size and storage of absmax."""

    quant_type: str
    block_size: int
    double_quant: bool
    compute_dtype: torch.dtype

    def _make_room(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        quant_type: str,
        block_size: int,
        double_quant: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Codes that mean nothing yet and no constants, for weights of these names and shapes."""
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        # A weight's name, and those of the buffers beside it: `absmax` and `nested_absmax` of `weight`.
        self._constants = {name: _constant_names(name) for name in shapes}
        self.weight_dtypes = dict.fromkeys(shapes, compute_dtype)
        self.nested_offsets = dict.fromkeys(shapes, 0.0)
        self.is_tied = False  # the weight is another module's, which writes its constants
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.compute_dtype = compute_dtype
        for name, shape in shapes.items():
            codes = torch.empty((math.prod(shape) + 1) // 2, 1, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
            # Persistent, or transformers would make them anew after loading; written under other names all the same.
            for constant in self._constants[name]:
                self.register_buffer(constant, None)

    def get_quantized(self, name: str) -> QuantizedTensor:
        """A weight.  Raises RuntimeError before it is set."""
        codes, nested_absmax = (self._buffers[constant] for constant in self._constants[name])
        if codes is None:
            raise RuntimeError(f"{type(self).__name__}'s {name} {tuple(self.shapes[name])} holds no weight yet.")
        absmax = codes if nested_absmax is None else DoubleQuantized(codes, nested_absmax, self.nested_offsets[name])
        return QuantizedTensor(
            getattr(self, name), absmax, self.shapes[name], self.weight_dtypes[name], self.quant_type, self.block_size
        )

    def set_quantized(self, name: str, quantized: QuantizedTensor) -> None:
        """Take a weight, sharing its memory.  Raises ValueError for another shape than the module's."""
        if quantized.shape != self.shapes[name]:
            raise ValueError(f"{name} is {tuple(quantized.shape)} and not {tuple(self.shapes[name])}")
        setattr(self, name, nn.Parameter(quantized.packed, requires_grad=False))
        self.quant_type, self.block_size = quantized.quant_type, quantized.block_size
        self.weight_dtypes[name] = quantized.dtype
        nested = quantized.absmax if isinstance(quantized.absmax, DoubleQuantized) else None
        self.double_quant = nested is not None
        absmax, nested_absmax = self._constants[name]
        setattr(self, absmax, nested.codes if nested else quantized.absmax)
        setattr(self, nested_absmax, nested.absmax if nested else None)
        self.nested_offsets[name] = nested.offset if nested else 0.0

    def tie(self, other: "PackedWeights") -> None:
        """Have the weight of another module, which has one of the same shape, for this module's own."""
        if other.packed_constants:
            self.set_quantized("weight", other.get_quantized("weight"))
        self.register_parameter("weight", other.get_parameter("weight"))
        self.is_tied = True

    @property
    def all_quantized(self) -> dict[str, QuantizedTensor]:
        """Every weight by its name."""
        return {name: self.get_quantized(name) for name in self.shapes}

    @property
    def packed_constants(self) -> list[Tensor]:
        """The buffers beside the codes, as many as there are yet."""
        found = [self._buffers[constant] for names in self._constants.values() for constant in names]
        return [tensor for tensor in found if tensor is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedWeights":
        # Module.to(dtype) casts every floating tensor, and constants in 16 bits would be another weight; seen as
        # bytes they only move.
        constants = self.packed_constants

        def keep_constants(tensor: Tensor) -> Tensor:
            is_constant = any(tensor is constant for constant in constants)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if is_constant else fn(tensor)  # type: ignore[no-any-return]

        super()._apply(keep_constants, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.shapes:
            absmax, nested_absmax = self._constants[name]
            if getattr(self, absmax) is None:
                continue
            for constant in (absmax, nested_absmax):
                destination.pop(prefix + constant, None)
            if self.is_tied:
                continue
            for suffix, tensor in to_keys(self.get_quantized(name)).items():
                destination[f"{prefix}{name}.{suffix}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        _metadata: Any,
        _strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        _error_messages: list[str],
    ) -> None:
        children = tuple(f"{child}." for child in self._modules)
        mine = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        mine = {key: tensor for key, tensor in mine.items() if not key.startswith(children)}
        for name in self.shapes:
            # On the meta device the module holds nothing yet, and takes the device of what comes.
            device = getattr(self, name).device
            packed = mine.pop(name, None)
            constants = {key: mine.pop(key) for key in list(mine) if key.startswith(f"{name}.")}
            if packed is None:
                missing_keys.append(f"{prefix}{name}")
                continue
            if device.type != "meta":
                packed, constants = packed.to(device), {key: tensor.to(device) for key, tensor in constants.items()}
            keys = {key.removeprefix(f"{name}."): tensor for key, tensor in constants.items()}
            self.set_quantized(name, from_keys(f"{prefix}{name}", packed, keys))
        others = {name: p for name, p in self._parameters.items() if name not in self.shapes and p is not None}
        for name, parameter in others.items():
            found = mine.pop(name, None)
            if found is None:
                missing_keys.append(prefix + name)
                continue
            if not parameter.is_meta:
                found = found.to(parameter.device)
            setattr(self, name, nn.Parameter(found.to(parameter.dtype), requires_grad=False))
        unexpected_keys += [prefix + key for key in mine]


def _constant_names(name: str) -> tuple[str, str]:
    stem = "" if name == "weight" else f"{name}_"
    return f"{stem}absmax", f"{stem}nested_absmax"
