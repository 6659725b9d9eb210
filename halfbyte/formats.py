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

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256  # absmax values that share one second-level absmax
OPTIMIZER_BLOCK_SIZE = 256  # values of an optimizer's 8-bit moment that share one absmax


def _divided(entries: list[float], unit: float) -> tuple[float, ...]:
    """In float32, as the formats' first writer divided: the last bit is part of the format."""
    divided: list[float] = torch.tensor(entries, dtype=torch.float32, device="cpu").div_(unit).tolist()
    return tuple(divided)


def _dynamic_map(signed: bool) -> tuple[float, ...]:
    """The dynamic 8-bit codebook (8-bit Optimizers, arXiv 2110.02861, section 1.3), 256 entries, ascending.

    Decade i of seven, 10^(i-6), is cut into 2^i steps (2^(i+1) when unsigned) and holds their midpoints, with
    either sign when signed: small numbers get range, large ones precision. Zero and one complete it.
    """
    entries = [0.0, 1.0]
    for decade in range(7):
        steps = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, steps + 1, dtype=torch.float32, device="cpu")
        magnitudes = ((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (decade - 6)).tolist()
        entries += magnitudes
        if signed:
            entries += [-m for m in magnitudes]
    return tuple(sorted(entries))


# What each 4-bit code stands for. Every number is exactly a float32.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    # NormalFloat: quantiles of the standard normal distribution scaled to [-1, 1], with an exact zero. Ascending.
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # Floating point: a sign bit, two exponent bits, one mantissa bit, in units of 1/12. In the order of the bits,
    # which is not ascending; codes 0 and 8 are both zero.
    "fp4": _divided([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], 12),
    # Integers in units of 1/7. Descending; codes 7 and 8 are both zero.
    "int4": _divided([7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7], 7),
}  # fmt: skip

# What each 8-bit code stands for: signed for what is centred on zero, unsigned for squares.
DYNAMIC_SIGNED = _dynamic_map(signed=True)
DYNAMIC_UNSIGNED = _dynamic_map(signed=False)


def packed_bytes(n: int) -> int:
    """Bytes that the 4-bit codes of `n` values take."""
    return (n + 1) // 2


def block_count(n: int, block_size: int) -> int:
    """Blocks, and so absmax values, of `n` values; the last may be short."""
    return -(-n // block_size)
