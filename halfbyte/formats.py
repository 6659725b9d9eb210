"""What the bytes mean.  A leaf: everything that reads or writes quantized weights agrees on this page.

A quantized tensor of n values, flattened row-major, is three arrays.

    packed     uint8    [ceil(n / 2)]            two 4-bit codes a byte: value 2i in the high nibble, 2i + 1 in the
                                                 low one.  An odd n is completed with the code of the value 0.
    absmax     float32  [ceil(n / block_size)]   the greatest |value| of each block, in the values' own unit.
                                                 Blocks are consecutive values of the flattened tensor: they
                                                 straddle rows, and the last one may be short.
    codebook   float32  [16]                     what each code stands for, as a fraction of absmax, in [-1, 1]

    value[i] = codebook[code[i]] * absmax[i // block_size]

Encoding takes the nearest codebook entry to x * (1 / absmax), where distances are judged by the float32 midpoints
between neighbouring entries and a value exactly on a midpoint goes to the lower entry.  Where two codes stand for the
same value the lower code is the one for values up to it: zero is code 7 in NF4 and INT4 and code 0 in FP4.  A block of
zeros has absmax 0.  Blocks of absmax below 1e-38, whose reciprocal would overflow, are encoded as if it were 1e-38.

Double quantization (QLoRA, arXiv 2305.14314, section 3) stores absmax itself in 8 bits, with a 256-entry codebook and
blocks of `NESTED_BLOCK_SIZE`; codes are then one uint8 a value, and the same formulas hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 4-bit NormalFloat: quantiles of the standard normal distribution scaled to [-1, 1], with an exact zero. Ascending.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# 4-bit floating point: a sign bit, two exponent bits, one mantissa bit, in units of 1/12. In the order of the bits,
# which is not ascending; codes 0 and 8 are both zero.
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

# Signed integers in units of 1/7. Descending; codes 7 and 8 are both zero.
INT4_SEVENTHS = (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0)

_ENTRIES_AND_UNIT = {"nf4": (NF4, 1.0), "fp4": (FP4_TWELFTHS, 12.0), "int4": (INT4_SEVENTHS, 7.0)}

QUANT_TYPES = tuple(_ENTRIES_AND_UNIT)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256  # absmax values that share one second-level absmax


def codebook(quant_type: str, device: torch.device | str = "cpu") -> Tensor:  # (16,) float32
    """The 4-bit codebook called `quant_type`, one of QUANT_TYPES; a KeyError for any other name."""
    entries, unit = _ENTRIES_AND_UNIT[quant_type]
    # Divided in float32, as the format's first writer did, for the last bit's sake.
    return torch.tensor(entries, dtype=torch.float32, device="cpu").div_(unit).to(device)


def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:  # (256,) float32, ascending
    """The dynamic 8-bit codebook (Dettmers, arXiv 1511.04561; 2110.02861, section 1.3).

    Decade i of seven, 10^(i-6), is cut into 2^i steps (2^(i+1) when unsigned) and holds their midpoints, with either
    sign when signed: small numbers get range, large ones precision. Zero and one complete it.
    """
    entries = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, steps + 1, dtype=torch.float32, device="cpu")
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = (midpoints * 10.0 ** (decade - 6)).tolist()
        entries += magnitudes
        if signed:
            entries += [-m for m in magnitudes]
    return torch.tensor(sorted(entries), dtype=torch.float32, device="cpu").to(device)


def packed_bytes(n: int) -> int:
    """Bytes that the 4-bit codes of `n` values take."""
    return (n + 1) // 2


def block_count(n: int, block_size: int) -> int:
    """Blocks, and so absmax values, of `n` values; the last may be short."""
    return -(-n // block_size)
