"""Products of dense matrices: what LoRA adds to a layer, forward and backward, and the output layer's.

    t  = s · drop(x) · Aᵀ        dA = dtᵀ · drop(x)
    dt = s · dy · B              dBᵀ = tᵀ · dy

With LoRA one side is of low rank: the activations are the large side and are read once, and the mask of a dropout is
made while they are read.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.ops import _checks, _dispatch
from halfbyte.ops._dropout import Dropout
from halfbyte.ops._library import register

_OP = "matmul_dense"


def matmul_dense(
    x: Tensor,  # (M, K)
    w: Tensor,  # (N, K), or (K, N) when transposed; the dtype of x: float32, bfloat16 or float16
    transpose: bool = False,
    scale: float = 1.0,
    dropout: Dropout | None = None,  # of x, or of w when transposed; what is kept is not scaled up
    dtype: torch.dtype | None = None,  # of the result: that of x, or float32
) -> Tensor:  # (M, N)
    """`scale · drop(x) · wᵀ`, or `scale · x · drop(w)` when transposed; sums are float32 and rounded once."""
    seed, threshold = (dropout.seed, dropout.threshold) if dropout is not None else (0, 0)
    return cast(Tensor, _matmul_dense(x, w, transpose, scale, seed, threshold, dtype))


def _run(
    x: Tensor,
    w: Tensor,
    transpose: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    threshold: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _checks.check_float_dtype(_OP, "dtype of x", x.dtype)
    if x.dim() != 2 or w.dim() != 2:
        raise HalfbyteError(f"{_OP}: x and w have {x.dim()} and {w.dim()} dimensions; each must have 2.")
    depth, columns = w.shape if transpose else reversed(w.shape)
    _checks.check_tensor(_OP, "x", x, x.dtype, x.shape[0] * depth, w.device)
    _checks.check_tensor(_OP, "w", w, x.dtype, depth * columns, x.device)
    if dtype not in (None, x.dtype, torch.float32):
        raise HalfbyteError(f"{_OP}: dtype is {dtype}; it must be that of x, {x.dtype}, or float32.")
    device = "cpu" if x.is_cpu else x.device.type
    return cast(Tensor, _dispatch.call(_OP, device, x, w, transpose, scale, seed, threshold, dtype or x.dtype))


def _fake(
    x: Tensor,
    w: Tensor,
    transpose: bool = False,
    _scale: float = 1.0,
    _seed: int = 0,
    _threshold: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1] if transpose else w.shape[0]), dtype=dtype)


_matmul_dense = register(
    "matmul_dense(Tensor x, Tensor w, bool transpose=False, float scale=1.0, int seed=0, int threshold=0, "
    "ScalarType? dtype=None) -> Tensor",
    _run,
    _fake,
)
