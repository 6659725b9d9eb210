"""Several products with 4-bit weights, added up: the gradient to what several frozen layers have read.

    dx = dy_q · W_q + dy_k · W_k + dy_v · W_v + drop(dt · A)

A sum over all their output features at once: no partial sum is rounded or goes through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.formats import NESTED_BLOCK_SIZE, block_count, packed_bytes
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._dropout import Dropout
from halfbyte.ops._library import register
from halfbyte.ops.matmul_4bit import Nested

_OP = "matmul_4bit_sum"
MOST_TERMS = 8  # as csrc/matmul_4bit.hpp has it


class Term(NamedTuple):
    """`x · W`; of one sum all x have one dtype and as many rows, all W as many columns."""

    x: Tensor  # (..., N); float32, bfloat16 or float16
    packed: Tensor  # ceil(N·K/2) uint8 in any shape
    absmax: Tensor  # (ceil(N·K/block_size),) float32, or uint8 codes with `nested`
    out_features: int  # N
    nested: Nested | None = None  # in all terms or in none, with one codebook


def matmul_4bit_sum(
    terms: Sequence[Term],  # one to eight
    codebook: Tensor,  # (16,) float32
    block_size: int,
    in_features: int,  # K
    low_rank: tuple[Tensor, Tensor] | None = None,  # t (..., r) and A (r, K); the dtype of the x
    dropout: Dropout | None = None,  # of `t · A`; what is kept is not scaled up
) -> Tensor:  # (..., K); the dtype of the x
    """`Σ x · W + drop(t · A)`.  One term is `matmul_4bit` transposed; QLoRA (arXiv 2305.14314), equation 5."""
    nested = [term.nested for term in terms if term.nested is not None]
    left, right = low_rank if low_rank is not None else (None, None)
    return cast(
        Tensor,
        _matmul_4bit_sum(
            [term.x for term in terms],
            [term.packed for term in terms],
            [term.absmax for term in terms],
            [term.out_features for term in terms],
            codebook,
            block_size,
            in_features,
            [each.absmax for each in nested],
            nested[0].codebook if nested else None,
            [each.offset for each in nested],
            left,
            right,
            dropout.seed if dropout is not None else 0,
            dropout.threshold if dropout is not None else 0,
        ),
    )


def _run(
    x: list[Tensor],
    packed: list[Tensor],
    absmax: list[Tensor],
    out_features: list[int],
    codebook: Tensor,
    block_size: int,
    in_features: int,
    nested_absmax: list[Tensor],
    nested_codebook: Tensor | None,
    nested_offset: list[float],
    left: Tensor | None,
    right: Tensor | None,
    seed: int,
    threshold: int,
) -> Tensor:
    if not 1 <= len(x) <= MOST_TERMS:
        raise HalfbyteError(f"{_OP}: there are {len(x)} terms; there must be 1 to {MOST_TERMS}.")
    if len(nested_absmax) not in (0, len(x)):
        raise HalfbyteError(f"{_OP}: {len(nested_absmax)} of {len(x)} terms are nested; all must be, or none.")
    dtype, device, rows = x[0].dtype, packed[0].device, x[0].shape[:-1].numel()
    _checks.check_float_dtype(_OP, "dtype of x", dtype)
    _checks.check_block_size(_OP, block_size)
    _checks.check_tensor(_OP, "codebook", codebook, torch.float32, 16, device)
    for i, out in enumerate(out_features):
        blocks = block_count(out * in_features, block_size)
        _checks.check_tensor(_OP, f"x of term {i}", x[i], dtype, rows * out, device)
        _checks.check_tensor(
            _OP, f"packed of term {i}", packed[i], torch.uint8, packed_bytes(out * in_features), device
        )
        _checks.check_tensor(
            _OP, f"absmax of term {i}", absmax[i], torch.uint8 if nested_absmax else torch.float32, blocks, device
        )
        if nested_absmax:
            nested_blocks = block_count(blocks, NESTED_BLOCK_SIZE)
            _checks.check_tensor(
                _OP, f"nested absmax of term {i}", nested_absmax[i], torch.float32, nested_blocks, device
            )
    if nested_codebook is not None:
        _checks.check_tensor(_OP, "nested codebook", nested_codebook, torch.float32, 256, device)
    if left is not None and right is not None:
        rank = left.shape[-1]
        _checks.check_tensor(_OP, "t", left, dtype, rows * rank, device)
        _checks.check_tensor(_OP, "A", right, dtype, rank * in_features, device)
    y = _dispatch.call(
        _OP,
        device.type,
        *(x, packed, absmax, out_features, codebook, block_size, in_features),
        *(nested_absmax, nested_codebook, nested_offset, left, right, seed, threshold),
    )
    return cast(Tensor, y)


def _fake(
    x: list[Tensor],
    _packed: list[Tensor],
    _absmax: list[Tensor],
    _out_features: list[int],
    _codebook: Tensor,
    _block_size: int,
    in_features: int,
    *_: object,
) -> Tensor:
    return x[0].new_empty((*x[0].shape[:-1], in_features))


_matmul_4bit_sum = register(
    "matmul_4bit_sum(Tensor[] x, Tensor[] packed, Tensor[] absmax, SymInt[] out_features, Tensor codebook, "
    "int block_size, SymInt in_features, Tensor[] nested_absmax, Tensor? nested_codebook, float[] nested_offset, "
    "Tensor? left, Tensor? right, int seed, int threshold) -> Tensor",
    _run,
    _fake,
)
