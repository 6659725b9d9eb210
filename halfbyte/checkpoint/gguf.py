"""A model into a .gguf file, a tensor at a time: memory holds the one that is being written.

A file of GGUF begins with what is in it, so names, shapes and kinds are settled before the first tensor comes, and with
them the place of each; they may then come in any order. Each is rounded once, from the numbers as they are:

    F32, F16, BF16    as they say; norms and biases are F32 in every file
    Q8_0, Q4_0        blocks of 32 weights with one scale, as the gguf package quantizes them; rows that are no multiple
                      of 32 are F16, and in a Q4_0 file the embedding and the output layer are Q8_0
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.gguf_families import GgufLayout

KINDS = {
    "float32": (Kind.F32, LlamaFileType.ALL_F32),
    "float16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_BLOCK = 32
_ENDS = ("token_embd.weight", "output.weight")
_CHUNK_VALUES = 1 << 24  # so many are encoded at once
_TORCH = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
# What is said of the weights, and not of the model.
_OF_THE_FILE = ("general.architecture", "general.file_type", "general.quantization_version", "split.", "GGUF.")


class GgufFile:
    """A .gguf file that is being written, with room for all of its tensors; whole when the `with` block has ended."""

    def __init__(self, path: Path, writer: GGUFWriter, tensors: Mapping[str, tuple[tuple[int, ...], Kind]]) -> None:
        """
        Args:
            writer: with the metadata in it, and no file yet.
            tensors: shape and kind of each tensor to come.
        """
        self._path = path
        self._kinds = {name: kind for name, (_, kind) in tensors.items()}
        self._places: dict[str, int] = {}
        self._shapes = {name: shape for name, (shape, _) in tensors.items()}
        self._writer = writer
        self._open: BinaryIO | None = None
        self.total_bytes = 0
        self.tensors = 0
        self.files = 1

    def __enter__(self) -> "GgufFile":
        writer = self._writer
        sizes = {name: _stored_bytes(shape, self._kinds[name]) for name, shape in self._shapes.items()}
        for name, shape in self._shapes.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], self._kinds[name])
        writer.write_header_to_file(self._path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (self._open,) = writer.fout
        end = GGUFWriter.ggml_pad(self._open.tell(), writer.data_alignment)
        for name, size in sizes.items():
            self._places[name] = end
            end += GGUFWriter.ggml_pad(size, writer.data_alignment)
        self._open.truncate(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._open is not None
        self._open.close()
        if kind is None and self._places:
            raise RuntimeError(f"{len(self._places)} tensors did not come, among them {min(self._places)}")

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.  Raises HalfbyteError where it holds what its kind cannot."""
        assert self._open is not None
        if tuple(tensor.shape) != self._shapes[name]:
            raise RuntimeError(f"{name} is {tuple(tensor.shape)} where {self._shapes[name]} was said")
        self._open.seek(self._places.pop(name))
        self.tensors += 1
        columns = tensor.shape[-1]
        rows = tensor.detach().cpu().reshape(-1, columns)
        step = max(1, _CHUNK_VALUES // columns)
        for begin in range(0, len(rows), step):
            encoded = encode(rows[begin : begin + step], self._kinds[name], name)
            self._open.write(encoded.data)
            self.total_bytes += encoded.nbytes


class GgufModel:
    """A merge's way into a file: by the base's own names of tensors."""

    def __init__(self, file: GgufFile, layout: GgufLayout, names: Mapping[str, str]) -> None:
        """
        Args:
            names: the names under which tensors will come, to the model's. Others are passed over: they are buffers
                that llama.cpp computes itself.
        """
        self._file = file
        self._layout = layout
        self._names = names
        self._written: set[str] = set()

    def __enter__(self) -> "GgufModel":
        self._file.__enter__()
        for name, tensor in self._layout.extra.items():
            self._file.add(name, tensor)
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def add(self, file_name: str, tensor: Tensor) -> None:
        """Write one tensor; a tied one once."""
        name = self._names.get(file_name)
        if name is None:
            return
        place = self._layout.names[name]
        if place not in self._written:
            self._written.add(place)
            transform = self._layout.transforms.get(name)
            self._file.add(place, tensor if transform is None else transform(tensor))

    @property
    def total_bytes(self) -> int:
        return self._file.total_bytes

    @property
    def tensors(self) -> int:
        return self._file.tensors

    @property
    def files(self) -> int:
        return self._file.files


def kind_of(name: str, shape: tuple[int, ...], dtype: str) -> Kind:
    """The kind of a tensor in a file of a `dtype` of KINDS."""
    kind, _ = KINDS[dtype]
    if len(shape) < 2:
        return Kind.F32
    if kind == Kind.Q4_0 and name in _ENDS:
        kind = Kind.Q8_0
    return Kind.F16 if kind in (Kind.Q8_0, Kind.Q4_0) and shape[-1] % _BLOCK else kind


def encode(rows: Tensor, kind: Kind, name: str) -> np.ndarray:  # (rows, columns), of any dtype -> bytes of each row
    """Values as a kind of GGUF has them.

    Raises:
        HalfbyteError: a value is too large for the kind.
    """
    if kind in _TORCH:
        converted = rows.to(_TORCH[kind])
        if kind == Kind.F16 and not converted.isfinite().all():
            raise HalfbyteError(f"{name} holds values beyond 65,504, which F16 cannot; use --dtype bfloat16.")
        values: np.ndarray = converted.contiguous().view(torch.uint8).numpy()
        return values
    with np.errstate(all="ignore"):  # the reciprocal of the scale of a block of zeros
        return np.ascontiguousarray(quantize(rows.float().numpy(), kind))


def copy_metadata(writer: GGUFWriter, reader: GGUFReader) -> None:
    """What a .gguf file says of its model, for one with other weights; not what the writer has been told already."""
    for key, value in reader.fields.items():
        if key.startswith(_OF_THE_FILE) or key in writer.kv_data[0]:
            continue
        sub_type = value.types[1] if value.types[0] == GGUFValueType.ARRAY else None
        contents = value.contents()
        if sub_type is None or contents:  # an empty list cannot be written
            writer.add_key_value(key, contents, value.types[0], sub_type)


def read_extra_tensors(reader: GGUFReader, known: set[str]) -> dict[str, Tensor]:
    """A file's tensors in F32 that are no parameters of the model, as rotary factors are not."""
    return {
        tensor.name: torch.from_numpy(np.array(tensor.data))
        for tensor in reader.tensors
        if tensor.name not in known and tensor.tensor_type == Kind.F32
    }


def _stored_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(prod(shape) // block * size)
