"""Dropout by a counter: which values are dropped is a function of a seed and of their place, so no mask is ever stored.

The function, here in plain torch and the oracle of csrc/kernels/dropout.hpp: two neighbours of a row share a 32-bit
hash, the even column its low sixteen bits, and a value is dropped where its bits are below `threshold`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 1 << 16  # probabilities are multiples of one in this many


@dataclass(frozen=True)
class Dropout:
    """What to drop from a matrix."""

    seed: int  # 0 to 2^63 - 1
    probability: float

    @classmethod
    def draw(cls, probability: float) -> Dropout:
        """A new mask, from torch's default generator: the same after the same `torch.manual_seed`."""
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        return cls(int(seed), probability)

    @property
    def threshold(self) -> int:
        return round(self.probability * STEPS)

    @property
    def scale(self) -> float:
        """What the values that are kept are multiplied by."""
        return STEPS / max(1, STEPS - self.threshold)

    def kept(self, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
        """`(rows, columns)` bool."""
        pairs = (columns + 1) // 2
        number = torch.arange(rows * pairs, device=device)
        low, high = self.seed & 0xFFFFFFFF, self.seed >> 32
        h = _mixed(_word(_word(number * 0x9E3779B1) + low), ((16, 0x7FEB352D), (15, 0x846CA68B)), 16)
        h = _mixed(_word(h + high), ((16, 0x21F0AAAD), (15, 0x735A2D97)), 15)
        halves = torch.stack((h & 0xFFFF, h >> 16), dim=1).view(rows, 2 * pairs)
        return halves[:, :columns] >= self.threshold


def _word(value: Tensor) -> Tensor:
    return value & 0xFFFFFFFF


def _mixed(h: Tensor, steps: tuple[tuple[int, int], ...], last_shift: int) -> Tensor:
    for shift, factor in steps:
        h = _word((h ^ h >> shift) * factor)
    return h ^ h >> last_shift
