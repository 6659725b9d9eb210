"""Where the compiled ops' outputs lie in memory.

torch asks glibc for memory by posix_memalign, which looks for a free block of the size *and* the alignment: a block
that was just freed is a few bytes too short for the next tensor of the same size, and unless a larger one is cut up,
the heap grows. With activations of two or three sizes that come and go by the layer this was a third of a run's memory.
malloc takes the block again; that is how NumPy asks, and the 64 bytes of alignment are asked for on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a line of the cache and the widest vector, as torch has it
_SMALL_BYTES = 1 << 16  # what is smaller leaves no gap that matters


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty(shape, dtype=dtype, device="cpu")`."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _SMALL_BYTES or torch.are_deterministic_algorithms_enabled():  # torch fills memory with NaN then
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
