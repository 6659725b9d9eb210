"""Hashes that say whether a base, or a file, is still the one that it was."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from halfbyte.nn import PackedWeights
from halfbyte.quant import to_keys


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the base's weights, in the order of their names: 4-bit codes and constants, and what is not in 4 bits.

    Neither the names nor an adapter's tensors enter, so a base hashes the same with an adapter around it as without.
    """
    digest = hashlib.sha256()
    modules = [(name.replace(".base_layer", ""), module) for name, module in model.named_modules()]
    for name, module in sorted(modules, key=lambda item: item[0]):
        if "lora_" in name:
            continue
        tensors = list(module.parameters(recurse=False))
        if isinstance(module, PackedWeights):
            for quantized in module.all_quantized.values():
                tensors += to_keys(quantized).values()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
