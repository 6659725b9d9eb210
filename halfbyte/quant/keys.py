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
from collections.abc import Mapping
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
        HalfbyteError: a key is missing, contradicts another, or holds a codebook that is not the format's.
    """
    state = _quant_state(name, keys)
    quant_type, block_size, shape = state["quant_type"], state["blocksize"], torch.Size(state["shape"])
    count = math.prod(shape)
    blocks = -(-count // block_size)
    codes = _expect(name, "weight", packed.contiguous().view(torch.uint8), (count + 1) // 2)
    _expect_codebook(name, keys, "quant_map", codebook_4bit(quant_type, torch.device("cpu")))
    absmax: Tensor | DoubleQuantized
    if "nested_absmax" in keys:
        if state.get("nested_blocksize") != formats.NESTED_BLOCK_SIZE:
            raise HalfbyteError(f"{name}: nested_blocksize {state.get('nested_blocksize')} is not 256.")
        _expect_codebook(name, keys, "nested_quant_map", codebook_8bit(torch.device("cpu")))
        absmax = DoubleQuantized(
            codes=_expect(name, "absmax", _get(name, keys, "absmax"), blocks),
            absmax=_expect(name, "nested_absmax", keys["nested_absmax"], -(-blocks // formats.NESTED_BLOCK_SIZE)),
            offset=float(state["nested_offset"]),
        )
    else:
        absmax = _expect(name, "absmax", _get(name, keys, "absmax"), blocks)
    dtype = getattr(torch, state["dtype"])
    return QuantizedTensor(codes.reshape(-1, 1), absmax, shape, dtype, quant_type, block_size)


def _quant_state(name: str, keys: Mapping[str, Tensor]) -> dict[str, Any]:
    found = [key for key in keys if key.startswith(QUANT_STATE_PREFIX)]
    if len(found) != 1:
        raise HalfbyteError(f"{name}: the 4-bit checkpoint has no {QUANT_STATE_PREFIX}* beside it.")
    try:
        state: dict[str, Any] = json.loads(bytes(keys[found[0]].cpu().tolist()))
        valid = (
            state["quant_type"] == found[0].removeprefix(QUANT_STATE_PREFIX)
            and state["blocksize"] > 0
            and isinstance(getattr(torch, state["dtype"]), torch.dtype)
            and all(size >= 0 for size in state["shape"])
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise HalfbyteError(f"{name}.{found[0]}: the quantization state does not read as JSON of this format.")
    return state


def _get(name: str, keys: Mapping[str, Tensor], suffix: str) -> Tensor:
    if suffix not in keys:
        raise HalfbyteError(f"{name}.{suffix} is missing from the 4-bit checkpoint.")
    return keys[suffix]


def _expect(name: str, suffix: str, tensor: Tensor, count: int) -> Tensor:
    if tensor.numel() != count:
        raise HalfbyteError(f"{name}: {suffix} holds {tensor.numel()} values where the shape asks for {count}.")
    return tensor.flatten()


def _expect_codebook(name: str, keys: Mapping[str, Tensor], suffix: str, expected: Tensor) -> None:
    if not torch.equal(_get(name, keys, suffix).float().cpu(), expected):
        raise HalfbyteError(f"{name}.{suffix} is another codebook than this format's.")
