"""A model's tensors into safetensors files, one at a time: memory holds the tensor that is being written.

    model.safetensors                                   one file, or
    model-00001-of-00003.safetensors …                  shards of at most so many bytes, and
    model.safetensors.index.json                        which tensor is in which

A file of safetensors begins with what is in it, which is known when the last tensor has been written. So room is left
for it, and what is left of the room is blanks, as the format allows.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from halfbyte.checkpoint.alignment import ALIGNMENT
from halfbyte.checkpoint.files import write_json

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_ENTRY_BYTES = 160  # of JSON for a tensor, beside its name


class ShardWriter:
    """Writes tensors into a directory; the files have their names when the `with` block has ended well."""

    def __init__(self, directory: Path, shard_bytes: int, names: int, name_bytes: int) -> None:
        """
        Args:
            shard_bytes: a new file is begun where one would be larger; one tensor may be.
            names: how many tensors there will be at most, all files together.
            name_bytes: length of the longest name.
        """
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._room = -(-(names * (name_bytes + _ENTRY_BYTES) + 64) // ALIGNMENT) * ALIGNMENT - 8
        self._files: list[Path] = []
        self._weight_map: dict[str, int] = {}
        self._open: BinaryIO | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0
        self.total_bytes = 0
        self.tensors = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._open is not None:
                self._open.close()
            return
        self._finish_file()
        count = len(self._files)
        names = [
            "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            for index in range(count)
        ]
        for file, name in zip(self._files, names, strict=True):
            file.rename(self._directory / name)
        if count > 1:
            weight_map = {name: names[index] for name, index in sorted(self._weight_map.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self._directory / "model.safetensors.index.json", index)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        if name in self._weight_map:
            raise RuntimeError(f"{name} is written a second time")
        if self._open is None or (self._end and self._end + tensor.nbytes > self._shard_bytes):
            self._finish_file()
            self._begin_file()
        assert self._open is not None
        if tensor.nbytes:
            self._open.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + tensor.nbytes],
        }
        self._end += tensor.nbytes
        self._weight_map[name] = len(self._files) - 1
        self.total_bytes += tensor.nbytes
        self.tensors += 1

    @property
    def files(self) -> int:
        return len(self._files)

    def _begin_file(self) -> None:
        path = self._directory / f"shard-{len(self._files) + 1:05d}.safetensors"
        self._files.append(path)
        self._open = path.open("wb")
        self._open.seek(8 + self._room)
        self._entries, self._end = {}, 0

    def _finish_file(self) -> None:
        if self._open is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}} | self._entries, ensure_ascii=False).encode()
        if len(header) > self._room:
            raise RuntimeError(f"{len(header)} bytes of header, where room was left for {self._room}")
        with self._open as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            file.truncate(8 + self._room + self._end)
        self._open = None
