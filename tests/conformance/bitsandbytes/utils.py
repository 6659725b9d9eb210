"""Small things that bitsandbytes' tests import."""

import json
from typing import Any

import torch
from torch import Tensor


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The UTF-8 bytes of the object as JSON, uint8."""
    return torch.tensor(list(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    return json.loads(bytes(tensor_data.tolist()))


def sync_gpu(t: Tensor) -> None:
    """There is nothing to wait for on the CPU."""
