"""What the bitsandbytes implementations share: its CUDA ops know codebooks by name, ours arrive as tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from halfbyte.formats import CODEBOOKS

# Reading a codebook back from the device waits for it, so each tensor is read once.
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()


def quant_type_of(codebook: Tensor) -> str | None:
    """`nf4` or `fp4`, or None for a codebook that bitsandbytes has no kernels for."""
    if codebook not in _names:
        on_cpu = codebook.cpu()
        known = (name for name in ("nf4", "fp4") if torch.equal(on_cpu, torch.tensor(CODEBOOKS[name])))
        _names[codebook] = next(known, None)
    name: str | None = _names[codebook]
    return name
