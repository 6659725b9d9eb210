"""The weights of a 16-bit checkpoint, each lent by the system's cache of its file until it is quantized.

To read a large tensor costs more than to quantize it: fresh memory is cleared a page at a time, and then copied into.
So the file is mapped, a matrix's pages are asked for at once when it is indexed with `[...]`, and pages are given back
every 64 MB: to give them back costs a millisecond or more, however few they are. transformers asks for the next tensor
when the last is quantized, so that much and one tensor is what memory holds; pages that are given back too early come
back when they are looked at.

What the model keeps in 16 bits is copied at the end: such pages are read-only, and would keep the file.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfbyte.huggingface.mapped import MappedFile, map_safetensors

_MOST_LENT_BYTES = 64 << 20


class Lender:
    """A directory's tensors."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            HalfbyteError: a shard is missing or truncated, or cannot be mapped, or the weights are in a format that is
                not read.
        """
        self.tensors, self._files = map_safetensors(directory)
        self._lent_bytes = 0
        for file in self._files:
            self.tensors |= {name: _Loan(self, file, tensor) for name, tensor in file.tensors.items()}

    def lend(self, file: MappedFile, tensor: Tensor) -> Tensor:
        """The tensor, its pages in memory."""
        if self._lent_bytes > _MOST_LENT_BYTES:
            for each in self._files:
                each.release()
            self._lent_bytes = 0
        file.populate(tensor)
        self._lent_bytes += tensor.nbytes
        return tensor

    def settle(self, model: nn.Module) -> None:
        """Copies what the model has kept of them."""
        for tensor in (*model.parameters(), *model.buffers()):
            if any(file.span_of(tensor) for file in self._files):
                tensor.data = tensor.data.clone()


class _Loan:
    """A tensor that is lent when it is indexed with `[...]`."""

    def __init__(self, lender: Lender, file: MappedFile, tensor: Tensor) -> None:
        self._lender = lender
        self._file = file
        self._tensor = tensor

    def __getitem__(self, _: Any) -> Tensor:
        return self._lender.lend(self._file, self._tensor)
