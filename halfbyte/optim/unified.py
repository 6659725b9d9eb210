"""State in CUDA's unified memory, which moves between device and host by itself: paging on a GPU.

bitsandbytes allocates it, as for QLoRA's authors (arXiv 2305.14314, section 3), until a kernel of ours is proven on a
device.
"""

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError


def unified_state(layout: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Zeros of the layout's shapes and dtypes, on `device` by name and wherever there is room by page.

    Raises:
        HalfbyteError: bitsandbytes is not installed.
    """
    try:
        functional = importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise HalfbyteError("a paged optimizer on a CUDA device needs bitsandbytes; install it.") from error
    state = {}
    for name, like in layout.items():
        # It comes as a tensor of the CPU's; the same addresses are the device's too.
        managed = functional.get_paged(max(1, like.nbytes), dtype=torch.uint8, device=device)
        interface = {"shape": (managed.numel(),), "typestr": "|u1", "data": (managed.data_ptr(), False), "version": 3}
        on_device = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=device)
        state[name] = on_device[: like.nbytes].view(like.dtype).view(like.shape).zero_()
    return state
