"""Where the inputs of layers lie between the forward pass that keeps them and the backward pass that wants them.

Where everything is computed again, a layer keeps its input alone (recompute.py). For long rows even those are much:

    none   in memory
    disk   in the pages of a file of its own, for each: they leave when memory runs short. The same bits
    8bit   a uint8 code a value and a float32 absmax for 256 of them: 0.508 of 16 bits.  Dettmers et al.
           (arXiv 2110.02861), section 2.  What is computed again differs from what was computed, and so do the
           gradients, a little

Only what carries a gradient is taken: tables and masks are the same tensors in every layer, and code would not do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.formats import NESTED_BLOCK_SIZE
from halfbyte.optim.paged import PageFile
from halfbyte.quant import codebook_8bit

SMALLEST_BYTES = 1 << 16  # below it a file of its own, or a call of a kernel, costs more than it gives

Stored = Callable[[], Tensor]


@contextmanager
def offloaded(kind: str, directory: Path | None = None) -> Iterator[None]:
    """Within, put what autograd keeps of a forward pass where `kind` says; the backward pass may be outside.

    Args:
        kind: `none`, `disk` or `8bit`.
        directory: for `disk`, where the files are made; they have no name.

    Raises:
        HalfbyteError: the directory cannot be written, or has too little room.
    """
    if kind == "none":
        yield
        return
    store = {"disk": lambda tensor: _to_pages(tensor, directory), "8bit": _to_8_bits}[kind]

    def pack(tensor: Tensor) -> Tensor | Stored:
        taken = tensor.requires_grad and tensor.is_floating_point() and tensor.nbytes >= SMALLEST_BYTES
        return store(tensor.detach()) if taken else tensor

    def unpack(kept: Tensor | Stored) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _to_pages(tensor: Tensor, directory: Path | None) -> Stored:
    assert directory is not None
    file = PageFile(directory, [{"kept": tensor}], "activations")
    kept = file.tensors[0]["kept"]
    kept.copy_(tensor)
    return lambda: kept


def _to_8_bits(tensor: Tensor) -> Stored:
    codebook, dtype, shape = codebook_8bit(tensor.device), tensor.dtype, tensor.shape
    codes, absmax = ops.quantize_8bit(tensor.float(), codebook, NESTED_BLOCK_SIZE)
    return lambda: ops.dequantize_8bit(codes, absmax, codebook, NESTED_BLOCK_SIZE).to(dtype).view(shape)
