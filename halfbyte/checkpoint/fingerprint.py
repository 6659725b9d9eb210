"""Hashes that say whether a base, or a file, is still the one that it was."""

import hashlib
from pathlib import Path

from torch import nn

from halfbyte.nn import Linear4bit
from halfbyte.quant import to_keys


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of every 4-bit weight of the model, codes and constants, in the order of their names.

    The names themselves do not enter, so a base hashes the same with an adapter around it as without.
    """
    digest = hashlib.sha256()
    layers = [(name.replace("base_layer", ""), module) for name, module in model.named_modules()]
    for _, layer in sorted((item for item in layers if isinstance(item[1], Linear4bit)), key=lambda item: item[0]):
        for tensor in (layer.weight, *to_keys(layer.quantized).values()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
