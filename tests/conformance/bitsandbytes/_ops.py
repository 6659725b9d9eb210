"""`torch.ops.bitsandbytes`: the schemas that callers use, on halfbyte's ops. Stored codes may be of any dtype."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.formats import CODEBOOKS, block_count, packed_bytes

from ._absent import LLM_INT8, NotInHalfbyteError

_LIBRARY = torch.library.Library("bitsandbytes", "DEF")
_LARGEST_BLOCK = 4096


def codebook(quant_type: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[quant_type], dtype=torch.float32, device=device)


def as_bytes(packed: Tensor, n: int) -> Tensor:
    """The uint8 codes of `n` values, which may be stored as another dtype and be longer by what fills an element."""
    return packed.contiguous().flatten().view(torch.uint8)[: packed_bytes(n)]


def as_storage(packed: Tensor, storage: torch.dtype) -> Tensor:
    """`(bytes / itemsize, 1)`, filled up with zeros where an element is wider than what is left."""
    filled = torch.nn.functional.pad(packed, (0, -packed.numel() % storage.itemsize))
    return filled.view(storage).view(-1, 1)


def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, absmax = ops.quantize_4bit(A.contiguous(), codebook(quant_type, A.device), blocksize)
    return as_storage(packed, quant_storage), absmax


def _quantize_4bit_fake(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    n = A.numel()
    stored = A.new_empty((-(-packed_bytes(n) // quant_storage.itemsize), 1), dtype=quant_storage)
    return stored, A.new_empty((block_count(n, blocksize),), dtype=torch.float32)


def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    codes = as_bytes(A, math.prod(shape))
    return ops.dequantize_4bit(codes, absmax, codebook(quant_type, A.device), blocksize, list(shape), dtype)


def _dequantize_4bit_fake(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return A.new_empty(shape, dtype=dtype)


def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    rows, columns = shapeB
    return ops.matmul_4bit(A, as_bytes(B, rows * columns), absmax, code, blocksize, (rows, columns))


def _gemv_4bit_fake(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    rows, columns = shapeB
    nested = None
    if absmax_8bit is not None:
        nested, absmax = ops.Nested(absmax, absmax_code, float(absmax_offset)), absmax_8bit
    codes = as_bytes(B, rows * columns)
    y = ops.matmul_4bit(A, codes, absmax, codebook(quant_type, A.device), blocksize, (rows, columns), nested=nested)
    return y if bias is None else y + bias


def _gemm_4bit_fake(A: Tensor, B: Tensor, shapeB: Sequence[int], *_: Any, **__: Any) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_8bit_block_size(blocksize)
    codes, absmax = ops.quantize_8bit(A.float().contiguous(), code.float(), blocksize)
    return codes.view(A.shape), absmax


def _quantize_blockwise_fake(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = A.new_empty((block_count(A.numel(), blocksize),), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8, memory_format=torch.contiguous_format), absmax


def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    check_8bit_block_size(blocksize)
    return ops.dequantize_8bit(A.contiguous(), absmax.flatten(), code, blocksize).to(dtype)


def _dequantize_blockwise_fake(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(A, dtype=dtype, memory_format=torch.contiguous_format)


def check_8bit_block_size(blocksize: int) -> None:
    if blocksize > _LARGEST_BLOCK:
        raise NotInHalfbyteError("quantize_blockwise", f"blocks of more than {_LARGEST_BLOCK} values")


def _into(run: Callable[..., Tensor]) -> Callable[..., None]:
    """The overload that writes into a tensor which the caller has."""

    def write(*arguments: Any, out: Tensor) -> None:
        out.copy_(run(*arguments))

    return write


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=_LIBRARY)


def _define_into(schema: str, run: Callable[..., Tensor]) -> None:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, lambda *arguments: _into(run)(*arguments[:-1], out=arguments[-1]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bitsandbytes::{name}", lambda *_, **__: None, lib=_LIBRARY)


_4BIT = "Tensor absmax, int blocksize, str quant_type"
_define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _quantize_4bit,
    _quantize_4bit_fake,
)
_define(
    f"dequantize_4bit(Tensor A, {_4BIT}, int[] shape, ScalarType dtype) -> Tensor",
    _dequantize_4bit,
    _dequantize_4bit_fake,
)
_define_into(
    f"dequantize_4bit.out(Tensor A, {_4BIT}, int[] shape, ScalarType dtype, Tensor(a!) out) -> ()", _dequantize_4bit
)
_define(
    "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    _gemv_4bit,
    _gemv_4bit_fake,
)
_define_into(
    "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor(a!) out) -> ()",
    _gemv_4bit,
)
_define(
    f"gemm_4bit(Tensor A, Tensor B, int[] shapeB, {_4BIT}, Tensor? bias=None, Tensor? absmax_8bit=None, "
    "Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    _gemm_4bit,
    _gemm_4bit_fake,
)
_define(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    _quantize_blockwise,
    _quantize_blockwise_fake,
)
_define(
    "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    _dequantize_blockwise,
    _dequantize_blockwise_fake,
)
_define_into(
    "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor(a!) out)"
    " -> ()",
    _dequantize_blockwise,
)


def _define_absent(schema: str) -> None:
    name = schema[: schema.index("(")]

    def refuse(*_: Any, **__: Any) -> None:
        raise NotInHalfbyteError(name, LLM_INT8)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, refuse, "CompositeExplicitAutograd")


for _schema in (
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out(Tensor A, Tensor B, Tensor(a!) out) -> ()",
    "int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None)"
    " -> Tensor",
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
):
    _define_absent(_schema)
