"""A directory's safetensors files: which they are, their tensors by name, and where the large ones lie.

Large matrices are not read: those of a 4-bit checkpoint are mapped for good (mapped.py), those that are to be
quantized for as long as that takes (lent.py). The rest is read here.
"""

import json
import warnings
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.errors import HalfbyteError

LARGE_BYTES = 1 << 14
_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Place(NamedTuple):
    """A tensor's bytes in its file."""

    dtype: torch.dtype
    shape: list[int]
    offset: int  # bytes from the beginning of the file
    nbytes: int

    def carve(self, buffer: Any, start: int = 0) -> Tensor:
        """The tensor, in a buffer that holds the file from byte `start` on; it keeps the buffer."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(buffer, dtype=self.dtype, count=prod(self.shape), offset=self.offset - start)
        return flat.view(self.shape)


def safetensors_files(directory: Path) -> list[Path]:
    """The files of a directory's tensors.  Raises HalfbyteError where there are none, or one is missing."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise HalfbyteError(f"{index} is not a readable index of shards ({error}).") from error
        for name in names:
            if not (directory / name).is_file():
                raise HalfbyteError(f"{index} names the shard {name}, which is missing; fetch it again.")
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    if list(directory.glob("*.bin")):
        raise HalfbyteError(
            f"{directory} holds weights only as pickle (*.bin), which is not read; save them as safetensors."
        )
    raise HalfbyteError(f"{directory} holds no model.safetensors and no model.safetensors.index.json.")


def read_safetensors(directory: Path) -> dict[str, Any]:
    """A directory's tensors by name, each read from disk when it is indexed with `[...]`, and not before.

    Raises:
        HalfbyteError: a shard is missing or truncated, or the weights are in a format that is not read.
    """
    tensors: dict[str, Any] = {}
    for file in safetensors_files(directory):
        try:
            # pread, not a memory map: a tensor that stays should not keep its file.
            handle = safe_open(file, framework="pt", backend="pread")
            names = handle.keys()  # type: ignore[no-untyped-call]
            tensors.update({name: handle.get_slice(name) for name in names})  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise HalfbyteError(
                f"{file} is not a readable safetensors file ({error}); fetch or copy it again."
            ) from error
    return tensors


def large_places(file: Path) -> Iterator[tuple[str, Place]]:
    """The matrices and absmax of 16 KiB and more, of a file that `read_safetensors` has found to be whole.

    Left out are types that weights and their codes do not come in, and what lies where its type cannot be read.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        begin, end = entry["data_offsets"]
        place = Place(_DTYPES[entry["dtype"]], entry["shape"], 8 + size + begin, end - begin)
        is_matrix = len(place.shape) > 1 or name.endswith(".absmax")
        if is_matrix and place.nbytes >= LARGE_BYTES and place.offset % place.dtype.itemsize == 0:
            yield name, place
