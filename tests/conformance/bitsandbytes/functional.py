"""`bitsandbytes.functional` over `halfbyte.ops` and `halfbyte.quant`: 4 bits, and 8 bits in blocks."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats import BLOCK_SIZES, CODEBOOKS, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from halfbyte.quant import DoubleQuantized, QuantizedTensor, codebook_8bit, to_keys

from ._absent import LLM_INT8, NotInHalfbyteError, absent_function
from ._ops import as_bytes, check_8bit_block_size
from .utils import unpack_tensor_to_dict

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.bitsandbytes

# ── Codebooks ───────────────────────────────────────────────────────────────────────────────────────────────────


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """`(256,)` float32, ascending. With 8 exponent bits the signed map is the same one: its last decade is empty."""
    if total_bits != 8 or max_exponent_bits not in ((7, 8) if signed else (7,)):
        raise NotInHalfbyteError("create_dynamic_map", "dynamic maps other than the 8-bit ones")
    return torch.tensor(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED)


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """`(256,)`: NF4's sixteen values, filled up with zeros between the negative and the positive ones."""
    if offset != 0.9677083 or not use_extra_value:
        raise NotInHalfbyteError("create_normal_map", "normal maps other than NF4's")
    values = [*CODEBOOKS["nf4"], *(240 * [0.0])]
    return torch.tensor(sorted(values))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """`(256,)`: equal steps, an odd number of them where there is a zero; filled up with zeros in the middle."""
    steps = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, steps)
    middle = steps // 2
    return torch.cat([values[:middle], torch.zeros(256 - steps), values[middle:]])


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """`(256,)` ascending, scaled to 1: every number of a float format, filled up with zeros."""
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(f"{exponent_bits} + {precision_bits} bits and a sign are not {total_bits} bits")
    bias = 2 ** (exponent_bits - 1)
    fractions = [k / 2**precision_bits for k in range(2**precision_bits)]
    magnitudes = [fraction * 2.0**-bias for fraction in fractions]  # the exponent 0: no leading one
    magnitudes += [
        (1 + fraction) * 2.0 ** (bias + 1 - exponent)
        for exponent in range(1, 2**exponent_bits)
        for fraction in fractions
    ]
    values = magnitudes + [-magnitude for magnitude in magnitudes if signed]
    return torch.tensor(sorted(values + (256 - len(values)) * [0.0])) / max(values)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    if typename not in CODEBOOKS:
        raise NotInHalfbyteError(f"get_4bit_type({typename!r})", "a 4-bit type other than nf4, fp4 and int4")
    return torch.tensor(CODEBOOKS[typename], dtype=torch.float32, device=device or "cpu")


# ── The state beside the codes ──────────────────────────────────────────────────────────────────────────────────


class QuantState:
    """What it takes beside the codes to read them. `state2` is the state of an absmax that is itself in 8 bits."""

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: "QuantState | None" = None,
    ) -> None:
        self.absmax, self.shape, self.code, self.dtype = absmax, shape, code, dtype
        self.blocksize, self.quant_type, self.offset, self.state2 = blocksize, quant_type, offset, state2
        self.nested = state2 is not None
        self._mean = 0.0 if offset is None else float(offset)  # a number, so that a compiler need not read a tensor

    @classmethod
    def of(cls, quantized: QuantizedTensor) -> "QuantState":
        absmax, offset, state2 = quantized.absmax, None, None
        if isinstance(absmax, DoubleQuantized):
            offset = torch.tensor(absmax.offset, device=absmax.codes.device)
            code = codebook_8bit(absmax.codes.device).clone()
            state2 = cls(absmax.absmax, code=code, blocksize=256, dtype=torch.float32)
            absmax = absmax.codes
        kind, device = quantized.quant_type, quantized.packed.device
        code = get_4bit_type(kind, device)
        return cls(absmax, quantized.shape, code, quantized.block_size, kind, quantized.dtype, offset, state2)

    def quantized(self, packed: Tensor) -> QuantizedTensor:
        """The codes with their constants, as halfbyte has them."""
        absmax = self.absmax.flatten()
        if self.state2 is not None:
            absmax = DoubleQuantized(absmax, self.state2.absmax, self._mean)
        codes = as_bytes(packed, math.prod(self.shape))
        return QuantizedTensor(codes, absmax, self.shape, self.dtype, self.quant_type, self.blocksize)

    def float_absmax(self) -> Tensor:
        """`(blocks,)` float32."""
        if self.state2 is None:
            return self.absmax
        return dequantize_blockwise(self.absmax, self.state2) + self._mean

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Tensors, numbers and words by key; `packed` has tensors alone, as checkpoints do."""
        if packed and self.quant_type is not None:
            empty = QuantizedTensor(
                self.absmax, self.quantized_absmax(), self.shape, self.dtype, self.quant_type, self.blocksize
            )
            return to_keys(empty)
        keys: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            keys |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self._mean,
            }
        return keys

    def quantized_absmax(self) -> Tensor | DoubleQuantized:
        if self.state2 is None:
            return self.absmax
        return DoubleQuantized(self.absmax, self.state2.absmax, self._mean)

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> "QuantState":
        """The inverse of `as_dict`, of either kind, under any prefix."""
        keys = {}
        for key, value in qs_dict.items():
            if "quant_state." in key:
                keys |= unpack_tensor_to_dict(value)
            else:
                keys[key.rpartition(".")[2]] = value
        offset, state2 = None, None
        if "nested_absmax" in keys:
            offset = torch.tensor(float(keys["nested_offset"]), device=device)
            state2 = cls(
                keys["nested_absmax"].to(device),
                code=keys["nested_quant_map"].to(device),
                blocksize=keys["nested_blocksize"],
                dtype=getattr(torch, keys["nested_dtype"]),
            )
        return cls(
            keys["absmax"].to(device),
            None if keys["shape"] is None else torch.Size(keys["shape"]),
            keys["quant_map"].to(device),
            keys["blocksize"],
            keys["quant_type"],
            getattr(torch, keys["dtype"]),
            offset,
            state2,
        )

    def to(self, device: torch.device | str) -> None:
        self.absmax, self.code = self.absmax.to(device), self.code.to(device)
        if self.state2 is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("bitsandbytes__"):  # sharding walks the keys of a state dict as attributes
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"QuantState has no {name}")

    def __getitem__(self, index: int) -> Any:
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        mine, theirs = self.as_dict(), other.as_dict()
        return mine.keys() == theirs.keys() and all(
            torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
            for key, value in mine.items()
        )

    __hash__ = None


# ── 4 bits ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_4bit(blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"invalid blocksize {blocksize}")
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if dtype not in _FLOATS:
        raise ValueError(f"Blockwise 4bit quantization only supports 16/32-bit floats, but got {dtype}")


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    blocksize = blocksize or 64
    _check_4bit(blocksize, quant_type, A.dtype)
    stored, constants = _ops.quantize_4bit.default(A, blocksize, quant_type, quant_storage)
    scales = DoubleQuantized.from_absmax(constants) if compress_statistics else constants
    state = QuantState.of(QuantizedTensor(stored, scales, A.shape, A.dtype, quant_type, blocksize))
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return stored if out is None else out.copy_(stored), state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit requires both absmax and out when quant_state is not provided")
        quant_state = QuantState(absmax, out.shape, None, blocksize or 64, quant_type, out.dtype)
    state = quant_state
    _check_4bit(state.blocksize, state.quant_type, state.dtype)
    constants = state.float_absmax(), state.blocksize, state.quant_type, state.shape, state.dtype
    if out is None:
        out = _ops.dequantize_4bit.default(A, *constants)
    else:
        _ops.dequantize_4bit.out(A, *constants, out=out)
    return out.t() if A.shape[0] == 1 else out  # codes that were transposed are a transposed weight's


quantize_fp4 = partial(quantize_4bit, quant_type="fp4")
quantize_nf4 = partial(quantize_4bit, quant_type="nf4")
dequantize_fp4 = partial(dequantize_4bit, quant_type="fp4")
dequantize_nf4 = partial(dequantize_4bit, quant_type="nf4")


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    if state is None:
        raise ValueError("state cannot be None. gemv_4bit() requires the state from quantize_4bit()")
    arguments = A, B, state.shape, state.float_absmax(), state.code, state.blocksize
    if out is None:
        return _ops.gemv_4bit.default(*arguments)
    _ops.gemv_4bit.out(*arguments, out=out)
    return out


# ── 8 bits in blocks ────────────────────────────────────────────────────────────────────────────────────────────


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    if A.dtype not in _FLOATS:
        raise ValueError(f"Blockwise quantization only supports 16/32-bit floats, but got {A.dtype}")
    check_8bit_block_size(blocksize)
    code = (create_dynamic_map() if code is None else code).to(A.device)
    codes, scales = _ops.quantize_blockwise.default(A, code, blocksize)
    offset, state2 = None, None
    if nested:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    state = QuantState(scales, None, code.clone(), blocksize, None, A.dtype, offset, state2)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise requires either quant_state or absmax")
        code = create_dynamic_map() if code is None else code
        quant_state = QuantState(absmax, None, code, blocksize, None, torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    if quant_state.blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {quant_state.blocksize}")
    arguments = A, quant_state.float_absmax(), quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype
    if out is None:
        return _ops.dequantize_blockwise.default(*arguments)
    _ops.dequantize_blockwise.out(*arguments, out=out)
    return out


# ── What halfbyte has not ───────────────────────────────────────────────────────────────────────────────────────


def has_avx512bf16() -> bool:
    """Whether weights must be packed anew for the CPU: halfbyte's never are."""
    return False


ipex_cpu = ipex_xpu = None

_INT8 = ("linear_matmul", "mm_dequant", "double_quant", "vectorwise_quant", "vectorwise_dequant")
for _name in (*(f"int8_{word}" for word in _INT8), "igemm", "batched_igemm", "spmm_coo", "COOSparseTensor"):
    globals()[_name] = absent_function(_name, LLM_INT8)
for _name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
    globals()[_name] = absent_function(_name, "an optimizer's step outside of the optimizer")
