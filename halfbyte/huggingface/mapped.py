"""The large tensors of a 4-bit checkpoint as pages of its files: nothing is read before it is used.

A mapped tensor's memory is the system's cache of the file. Processes that map the same file share it, and where memory
is short the system takes pages away, which costs nothing since they are clean, and reads them back when they are used.

    mapped    codes, absmax, and matrices in 16 bits (embeddings, the output layer)
    read      vectors, and whatever is smaller than 16 KiB or lies where its type cannot be read in place

The pages are read-only, so that no mistake can reach the file: what writes to them ends the process with SIGSEGV. Norms
and biases, which some fine-tuning trains in place, are read for that reason, and what is mapped requires no gradient.

While weights are being *quantized* nothing is mapped (source.py): pages of the 16-bit file would count as this
process's memory, and none of them is needed twice.
"""

import json
import mmap
import os
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.source import read_safetensors, safetensors_files

SMALL_BYTES = 1 << 14
# One request reads no more than the device's largest, or than its window for reading ahead, whatever it asks for.
_REQUEST_BYTES = 1 << 19
_RECORD = "halfbyte_mapped_bytes"
_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def map_safetensors(directory: Path) -> "tuple[dict[str, Any], list[MappedFile]]":
    """A directory's tensors by name, mapped or, as in `read_safetensors`, read when they are indexed; and the files.

    Raises:
        HalfbyteError: a shard is missing or truncated, or the weights are in a format that is not read.
    """
    tensors = read_safetensors(directory)
    files = [MappedFile(path) for path in safetensors_files(directory)]
    for file in files:
        tensors.update(file.tensors())
    return tensors, files


class MappedFile:
    """A safetensors file in memory, read-only.  It stays there for as long as one of its tensors lives."""

    def __init__(self, path: Path) -> None:
        """Of a file that `read_safetensors` has found to be whole.

        Raises:
            HalfbyteError: it cannot be mapped.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._state = self._read_state()
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise HalfbyteError(f"{path} cannot be mapped into memory ({error}); copy it to a local disk.") from error
        self._address = self._carve(torch.uint8, [1], 0).data_ptr()

    def tensors(self) -> dict[str, Tensor]:
        """What is mapped, by name."""
        mapped = {}
        start = 8 + int.from_bytes(self._map[:8], "little")
        for name, entry in json.loads(self._map[8:start]).items():
            if name == "__metadata__" or entry["dtype"] not in _DTYPES:
                continue
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            is_matrix = len(shape) > 1 or name.endswith(".absmax")
            if is_matrix and end - begin >= SMALL_BYTES and (start + begin) % dtype.itemsize == 0:
                mapped[name] = self._carve(dtype, shape, start + begin)
        return mapped

    def span_of(self, tensor: Tensor) -> "Span | None":
        """Where the tensor lies in the file; None if it does not."""
        offset = tensor.data_ptr() - self._address
        return Span(self, offset, tensor.nbytes) if 0 <= offset < len(self._map) else None

    def check_unchanged(self) -> None:
        """Raises HalfbyteError if the file was written to: its pages are then not what was loaded, or gone."""
        if self._read_state() != self._state:
            raise HalfbyteError(
                f"{self.path} was written to while the model in it was in use; load the model again, and replace such"
                " files by renaming another to their name."
            )

    def request(self, offset: int, nbytes: int) -> None:
        """Have the system read a part of the file that is not in memory, without waiting for it."""
        if hasattr(os, "posix_fadvise"):  # macOS has none, and reads ahead by itself alone
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def evict(self) -> None:
        """Give the memory back at once, as the system does when it needs it and nobody else maps the file."""
        self._map.madvise(mmap.MADV_DONTNEED)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _carve(self, dtype: torch.dtype, shape: list[int], offset: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            return torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=offset).view(shape)

    def _read_state(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Span:
    """A part of a mapped file."""

    file: MappedFile
    offset: int
    nbytes: int

    def parts(self) -> "list[Span]":
        """The same, in parts that one request reads."""
        end = self.offset + self.nbytes
        starts = range(self.offset, end, _REQUEST_BYTES)
        return [Span(self.file, start, min(_REQUEST_BYTES, end - start)) for start in starts]


def spans_of(module: nn.Module, files: Sequence[MappedFile]) -> list[Span]:
    """Where the module's parameters and buffers lie in the files, in the file's order; empty where none does."""
    found = []
    for tensor in (*module.parameters(), *module.buffers()):
        spans = (file.span_of(tensor) for file in files)
        found += [span for span in spans if span is not None]
    return sorted(found, key=lambda span: (str(span.file.path), span.offset))


def freeze_mapped(model: nn.Module, files: Sequence[MappedFile]) -> None:
    """No gradient for what is mapped, so that no optimizer writes there; and keep how many bytes it is."""
    for parameter in model.parameters():
        if any(file.span_of(parameter) for file in files):
            parameter.requires_grad_(False)
    setattr(model, _RECORD, sum(span.nbytes for span in spans_of(model, files)))


def mapped_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights that are pages of files, under whatever now wraps it."""
    return int(getattr(model, _RECORD, 0))
