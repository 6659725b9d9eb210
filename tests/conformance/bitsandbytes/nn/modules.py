"""A parameter that is quantized when it is first moved to a device, and the layers that hold one."""

import copy
import logging
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import halfbyte.nn

from .. import functional
from .._absent import LLM_INT8, absent_class
from ..autograd._functions import matmul_4bit
from ..functional import QuantState

logger = logging.getLogger(__name__)


def _tell(sentence: str) -> None:
    """By the log, as bitsandbytes does since 0.50, and by a warning, once, as it did before."""
    logger.warning(sentence)
    if not torch.compiler.is_compiling():
        warnings.warn(sentence, stacklevel=3)
        warnings.filterwarnings("ignore", re.escape(sentence))


class Params4bit(nn.Parameter):
    """A weight until it is moved to a device, and from then on its codes, with `quant_state` beside them."""

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **_: Any,  # what callers find in the `__dict__` of another one
    ) -> "Params4bit":
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.quant_state, self.blocksize = quant_state, blocksize or 64
        self.compress_statistics, self.quant_type, self.quant_storage = compress_statistics, quant_type, quant_storage
        self.module, self.bnb_quantized = module, bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cpu",
        module: nn.Module | None = None,
        **_: Any,
    ) -> "Params4bit":
        state = QuantState.from_dict(quantized_stats, device)
        self = cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type,
            data.dtype,
            module,
            bnb_quantized=True,
        )
        self._tell_module()
        return self

    def _tell_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state

    def _quantize(self, device: torch.device | str) -> "Params4bit":
        self.data, self.quant_state = functional.quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.bnb_quantized = True
        self._tell_module()
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Params4bit":
        """Quantizes a weight that is moved to a device. Codes are moved, and never cast."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            return self._quantize(device)
        if self.quant_state is not None and device is not None:
            self.quant_state.to(device)
        moved = super().to(device=device, dtype=None if self.bnb_quantized else dtype, non_blocking=non_blocking)
        return type(self)(moved, **self.__dict__)

    def cpu(self) -> "Params4bit":
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> "Params4bit":
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def __copy__(self) -> "Params4bit":
        return type(self)(self.data, self.requires_grad, **self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Params4bit":
        new = type(self)(self.data.clone(), self.requires_grad)
        memo[id(self)] = new  # before its module, which holds it
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.data, self.requires_grad), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (torch.chunk, torch.split):  # shards keep what they are
            return tuple(cls(piece, args[0].requires_grad, **args[0].__dict__) for piece in result)
        return result


# Sharding walks the keys of a state dict as attributes: `weight.absmax`, `weight.nested_quant_map`.
_PATHS = {name: (name,) for name in ("absmax", "code", "offset", "state2")}
_PATHS |= {"quant_map": ("code",), "nested_offset": ("offset",)}
_PATHS |= {f"nested_{name}": ("state2", name) for name in ("absmax", "blocksize", "dtype")}
_PATHS |= {"nested_quant_map": ("state2", "code")}


def _through_the_state(name: str, path: tuple[str, ...]) -> property:
    def get(self: Params4bit) -> Any:
        value: Any = self.__dict__.get("quant_state")
        for step in path:
            if value is None:
                raise AttributeError(f"Params4bit has no {name}")
            value = getattr(value, step)
        return value

    return property(get)


for _name, _path in _PATHS.items():
    setattr(Params4bit, _name, _through_the_state(_name, _path))


def _restore_quant_state(module: nn.Module) -> None:
    """Sharding may leave a plain parameter of the same codes; the module still has their state."""
    if getattr(module.weight, "quant_state", None) is not None:
        return
    if module.quant_state is None:
        raise RuntimeError(f"{type(module).__name__} is not quantized yet: move it to a device first.")
    if not isinstance(module.weight, Params4bit):
        module.weight = Params4bit(module.weight, quant_storage=module.quant_storage, bnb_quantized=True)
    module.weight.quant_state = module.quant_state


class Linear4bit(nn.Linear):
    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def set_compute_type(self, x: Tensor) -> None:
        """The first input's dtype, unless it is float16: that is told, and kept."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32):
            slow = "inference" if x.numel() == x.shape[-1] else "inference or training speed"
            _tell(f"The input is float16 and compute_dtype is float32, the default: slow {slow}.")

    def forward(self, x: Tensor) -> Tensor:
        _restore_quant_state(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        rounded = x if self.compute_dtype is None else x.to(self.compute_dtype)
        bias = self.bias
        if bias is not None and bias.dtype != rounded.dtype:
            bias.data = bias.data.to(rounded.dtype)
        return matmul_4bit(rounded, self.weight.data, bias=bias, quant_state=self.weight.quant_state).to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if getattr(self.weight, "quant_state", None) is not None:
            for key, value in self.weight.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value


class LinearFP4(Linear4bit):
    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class Embedding4bit(nn.Embedding):
    """A table of codes, in which halfbyte's own embedding looks rows up."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype, self.quant_storage = self.weight.dtype, quant_storage
        self.quant_state: QuantState | None = None
        self.weight = Params4bit(
            self.weight.data, compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage, module=self
        )
        size = self.weight.blocksize
        if embedding_dim % size:
            _tell(f"The embedding size {embedding_dim} is not divisible by the block size {size}: slow inference.")

    def forward(self, input: Tensor) -> Tensor:
        _restore_quant_state(self)
        table = halfbyte.nn.Embedding4bit(
            self.num_embeddings, self.embedding_dim, compute_dtype=self.dtype, device="meta"
        )
        table.quantized = self.weight.quant_state.quantized(self.weight.data)
        return table(input)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError("Saving Embedding4bit module is not implemented")


class EmbeddingFP4(Embedding4bit):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


Linear8bitLt: Any = absent_class("Linear8bitLt", LLM_INT8, nn.Linear)
Embedding8bit: Any = absent_class("Embedding8bit", LLM_INT8, nn.Embedding)
Int8Params: Any = absent_class("Int8Params", LLM_INT8)
OutlierAwareLinear: Any = absent_class("OutlierAwareLinear", LLM_INT8, nn.Linear)
StableEmbedding: Any = absent_class("StableEmbedding", "embeddings with an optimizer of their own", nn.Embedding)
Embedding: Any = absent_class("Embedding", "embeddings with an optimizer of their own", nn.Embedding)
