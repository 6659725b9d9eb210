"""A 4-bit tensor's keys on disk: bitsandbytes' own, so that every tool that reads those checkpoints reads ours.

Beside `X` (the packed codes, uint8) stand

    X.absmax                                one value a block: uint8 if nested, else float32
    X.quant_map                             (16,) float32
    X.nested_absmax, X.nested_quant_map     only if nested: float32, (256,) float32
    X.quant_state.bitsandbytes__nf4         (or __fp4, __int4) the UTF-8 bytes, as uint8, of a JSON object:
                                            quant_type, blocksize, dtype, shape and, if nested,
                                            nested_blocksize, nested_dtype, nested_offset, in this order
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte import formats
from halfbyte.errors import HalfbyteError
from halfbyte.quant.quantized import DoubleQuantized, QuantizedTensor, codebook_4bit, codebook_8bit

QUANT_STATE_PREFIX = "quant_state.bitsandbytes__"


def to_keys(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that stand beside the packed codes, by suffix (`absmax`, `quant_map`, …)."""
    state: dict[str, object] = {
        "quant_type": quantized.quant_type,
        "blocksize": quantized.block_size,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    keys = {"quant_map": quantized.codebook.clone()}
    if isinstance(quantized.absmax, DoubleQuantized):
        nested = quantized.absmax
        state |= {
            "nested_blocksize": formats.NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": nested.offset,
        }
        keys["absmax"] = nested.codes
        keys["nested_absmax"] = nested.absmax
        keys["nested_quant_map"] = codebook_8bit(nested.codes.device).clone()
    else:
        keys["absmax"] = quantized.absmax
    encoded = json.dumps(state).encode()
    keys[QUANT_STATE_PREFIX + quantized.quant_type] = torch.tensor(list(encoded), dtype=torch.uint8)
    return keys


def from_keys(name: str, packed: Tensor, keys: Mapping[str, Tensor]) -> QuantizedTensor:
    """The inverse of `to_keys`; `packed` may be stored in any dtype, its bytes are what counts.

    Raises:
        HalfbyteError: a key is missing, contradicts another, is not finite, or holds a codebook that is not
            the format's; `name` and the key are told.
    """
    state = _quant_state(name, keys)
    quant_type, block_size, shape = state["quant_type"], state["blocksize"], torch.Size(state["shape"])
    blocks = formats.block_count(math.prod(shape), block_size)
    codes = packed.contiguous().flatten().view(torch.uint8)
    if codes.numel() != formats.packed_bytes(math.prod(shape)):
        raise HalfbyteError(f"{name} is {codes.numel()} bytes, which is not what its shape {list(shape)} takes.")
    _check_codebook(name, keys, "quant_map", codebook_4bit(quant_type, torch.device("cpu")))
    absmax: Tensor | DoubleQuantized
    if "nested_offset" in state:
        _check_codebook(name, keys, "nested_quant_map", codebook_8bit(torch.device("cpu")))
        absmax = DoubleQuantized(
            codes=_constants(name, keys, "absmax", blocks, torch.uint8),
            absmax=_constants(
                name, keys, "nested_absmax", formats.block_count(blocks, formats.NESTED_BLOCK_SIZE), torch.float32
            ),
            offset=float(state["nested_offset"]),
        )
    else:
        absmax = _constants(name, keys, "absmax", blocks, torch.float32)
    dtype = getattr(torch, state["dtype"])
    return QuantizedTensor(codes.reshape(-1, 1), absmax, shape, dtype, quant_type, block_size)


def _quant_state(name: str, keys: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON object, every value of it checked; `nested_offset` is in it if the absmax is quantized."""
    found = [key for key in keys if key.startswith(QUANT_STATE_PREFIX)]
    if len(found) != 1:
        raise HalfbyteError(f"{name} has {len(found)} keys {QUANT_STATE_PREFIX}* beside it; a 4-bit weight has one.")
    key = f"{name}.{found[0]}"
    try:
        state = json.loads(bytes(keys[found[0]].tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise HalfbyteError(f"{key} does not read as JSON ({error}).") from error
    if not isinstance(state, dict):
        raise HalfbyteError(f"{key} is not a JSON object.")
    nested = any(field.startswith("nested_") for field in (*keys, *state))
    for field, is_valid in (_VALID | (_VALID_NESTED if nested else {})).items():
        if not is_valid(state.get(field)):
            raise HalfbyteError(f"{key}: {field} is {state.get(field)!r:.80}, which this format does not have.")
    if state["quant_type"] != found[0].removeprefix(QUANT_STATE_PREFIX):
        raise HalfbyteError(f"{key}: quant_type is {state['quant_type']!r}, which is not what the key says.")
    return state


# What each value of the quantization state may be. JSON knows numbers that Python takes for one another: 64.0, true.
_VALID: dict[str, Callable[[Any], bool]] = {
    "quant_type": lambda value: isinstance(value, str) and value in formats.CODEBOOKS,
    "blocksize": lambda value: type(value) is int and value in formats.BLOCK_SIZES,
    "dtype": lambda value: value in ("float32", "bfloat16", "float16"),
    "shape": lambda value: isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value),
}
_VALID_NESTED: dict[str, Callable[[Any], bool]] = {
    "nested_blocksize": lambda value: type(value) is int and value == formats.NESTED_BLOCK_SIZE,
    "nested_dtype": lambda value: value == "float32",
    "nested_offset": lambda value: type(value) is float and math.isfinite(value),
}


def _get(name: str, keys: Mapping[str, Tensor], suffix: str) -> Tensor:
    if suffix not in keys:
        raise HalfbyteError(f"{name}.{suffix} is missing from the 4-bit checkpoint.")
    return keys[suffix]


def _constants(name: str, keys: Mapping[str, Tensor], suffix: str, count: int, dtype: torch.dtype) -> Tensor:
    tensor = _get(name, keys, suffix)
    if tensor.dtype != dtype or tensor.numel() != count:
        raise HalfbyteError(
            f"{name}.{suffix} is {tensor.numel()} values of {tensor.dtype} where the shape asks for {count} of {dtype}."
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise HalfbyteError(f"{name}.{suffix} holds a NaN or an infinity.")
    return tensor.flatten()


def _check_codebook(name: str, keys: Mapping[str, Tensor], suffix: str, expected: Tensor) -> None:
    if not torch.equal(_get(name, keys, suffix).float().cpu(), expected):
        raise HalfbyteError(f"{name}.{suffix} is another codebook than this format's.")
