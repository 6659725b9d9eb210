"""The product of activations with a 4-bit weight: a frozen layer's forward and, transposed, its backward.

One op with a flag rather than two: both directions take the same arguments, obey the same checks and run the same
loops; which way the weight's rows run through a panel is all that differs.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from halfbyte.formats import NESTED_BLOCK_SIZE, block_count, packed_bytes
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._dropout import Dropout
from halfbyte.ops._library import register

_OP = "matmul_4bit"


class Nested(NamedTuple):
    """What dequantizes an absmax that is stored in 8 bits: `codebook[code] * absmax[i // 256] + offset`."""

    absmax: Tensor  # (ceil(blocks/256),) float32
    codebook: Tensor  # (256,) float32
    offset: float  # exact in float32


def matmul_4bit(
    x: Tensor,  # (..., K), or (..., N) when transposed; float32, bfloat16 or float16
    packed: Tensor,  # ceil(N·K/2) uint8 in any shape; element 2i in the high nibble
    absmax: Tensor,  # (ceil(N·K/block_size),) float32, or uint8 codes with `nested`
    codebook: Tensor,  # (16,) float32
    block_size: int,  # values that share one absmax
    shape: tuple[int, int],  # (N, K) of the weight W
    transpose: bool = False,
    *,
    nested: Nested | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,  # t (..., r) and B (N, r), or A (r, K) when transposed; as x
    dropout: Dropout | None = None,  # of `t · A`; what is kept is not scaled up
) -> Tensor:  # (..., N), or (..., K) when transposed; the dtype of x
    """`x · Wᵀ + t · Bᵀ`, or `x · W + drop(t · A)` when transposed, without the weight ever being in memory.

    A weight is the value that `dequantize_4bit` gives in the dtype of `x`; sums are float32 and rounded once. So the
    result differs from the dense product's by the order of summation alone.  QLoRA (arXiv 2305.14314), equation 5.
    """
    nested_absmax, nested_codebook, nested_offset = nested if nested is not None else (None, None, 0.0)
    left, right = low_rank if low_rank is not None else (None, None)
    seed, threshold = (dropout.seed, dropout.threshold) if dropout is not None else (0, 0)
    return cast(
        Tensor,
        _matmul_4bit(
            x,
            packed,
            absmax,
            codebook,
            block_size,
            shape,
            transpose,
            nested_absmax,
            nested_codebook,
            nested_offset,
            left,
            right,
            seed,
            threshold,
        ),
    )


def _run(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: list[int],
    transpose: bool = False,
    nested_absmax: Tensor | None = None,
    nested_codebook: Tensor | None = None,
    nested_offset: float = 0.0,
    left: Tensor | None = None,
    right: Tensor | None = None,
    seed: int = 0,
    threshold: int = 0,
) -> Tensor:
    out_features, in_features = shape
    n, device = out_features * in_features, packed.device
    blocks = block_count(n, block_size)
    depth, columns = (out_features, in_features) if transpose else (in_features, out_features)
    _checks.check_float_dtype(_OP, "dtype of x", x.dtype)
    _checks.check_block_size(_OP, block_size)
    rows = x.shape[:-1].numel()
    _checks.check_tensor(_OP, "x", x, x.dtype, rows * depth, device)
    _checks.check_tensor(_OP, "packed", packed, torch.uint8, packed_bytes(n), device)
    _checks.check_tensor(_OP, "codebook", codebook, torch.float32, 16, device)
    if nested_absmax is None or nested_codebook is None:
        _checks.check_tensor(_OP, "absmax", absmax, torch.float32, blocks, device)
    else:
        nested_blocks = block_count(blocks, NESTED_BLOCK_SIZE)
        _checks.check_tensor(_OP, "absmax", absmax, torch.uint8, blocks, device)
        _checks.check_tensor(_OP, "nested absmax", nested_absmax, torch.float32, nested_blocks, device)
        _checks.check_tensor(_OP, "nested codebook", nested_codebook, torch.float32, 256, device)
    if left is not None and right is not None:
        rank = left.shape[-1]
        _checks.check_tensor(_OP, "t", left, x.dtype, rows * rank, device)
        _checks.check_tensor(_OP, "A" if transpose else "B", right, x.dtype, rank * columns, device)
    y = _dispatch.call(
        _OP,
        "cpu" if packed.is_cpu else device.type,
        x,
        packed,
        absmax,
        codebook,
        block_size,
        shape,
        transpose,
        nested_absmax,
        nested_codebook,
        nested_offset,
        left,
        right,
        seed,
        threshold,
    )
    return cast(Tensor, y)


def _fake(
    x: Tensor,
    _packed: Tensor,
    _absmax: Tensor,
    _codebook: Tensor,
    _block_size: int,
    shape: list[int],
    transpose: bool = False,
    *_: object,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[1] if transpose else shape[0]))


_matmul_4bit = register(
    "matmul_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor codebook, int block_size, SymInt[] shape, "
    "bool transpose=False, Tensor? nested_absmax=None, Tensor? nested_codebook=None, float nested_offset=0.0, "
    "Tensor? left=None, Tensor? right=None, int seed=0, int threshold=0) -> Tensor",
    _run,
    _fake,
)
