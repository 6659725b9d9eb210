"""Adapters into the weights of their base, tensor by tensor: read, changed in float32, rounded once, written.

    onto the original     round16(W + Δ)         W as the 16-bit files have it
    onto the quantized    round16(Ŵ + Δ)         Ŵ = dequantize(quantize(W)): what training saw
    into 4 bits           quantize(… + Δ)        one quantization, of the sum of all deltas

What the adapters do not touch is passed on as it is, and all of it under its file's own names, so that whatever opened
the base opens the merge; in 4 bits a mixture's experts are one tensor, as halfbyte saves them. The fingerprint of the
base is taken on the way, in the order in which `weights_sha256` takes it: a base that is not the one of the training is
known when the last tensor has been read, and before the directory has its name.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import ShardWriter
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface.adapter_changes import Change, apply_changes, apply_to_rows, are_row_wise
from halfbyte.huggingface.base_weights import BaseWeights, FourBitLayout
from halfbyte.quant import QuantizedTensor, quantize_4bit, to_keys

Onto = Literal["original", "quantized"]
SHARD_BYTES = 5_000_000_000  # as transformers has them
_SLICE_VALUES = 1 << 18  # that are merged at a time: 1 MB in float32
_KEYS_A_WEIGHT = 6  # codes and the five tensors of their constants


@dataclass(frozen=True)
class Settings:
    """How to merge."""

    onto: Onto
    dtype: torch.dtype | None = torch.bfloat16  # of what is not in 4 bits; None: as it comes, float32 where it changed
    layout: FourBitLayout | None = None  # of the output; None is 16 bits
    combination: str = "linear"
    density: float = 0.5
    shard_bytes: int = SHARD_BYTES
    fingerprint: bool = True  # of the base, which has to be quantized for it


@dataclass(frozen=True)
class MergedWeights:
    """What was written."""

    bytes: int
    files: int
    tensors: int
    changed: int  # parameters that the adapters change
    base_sha256: str | None  # `weights_sha256` of the base in 4 bits; None where it was not, or cannot be, taken
    untied: bool  # the output layer and the embedding are no longer one


class TensorWriter(Protocol):
    """Where merged tensors go, one after another."""

    @property
    def total_bytes(self) -> int: ...

    @property
    def tensors(self) -> int: ...

    @property
    def files(self) -> int: ...

    def add(self, name: str, tensor: Tensor) -> None: ...


def merge_weights(
    base: BaseWeights,
    changes: Mapping[str, Sequence[Change]],
    output: Path | AbstractContextManager[TensorWriter],
    settings: Settings,
) -> MergedWeights:
    """Write the merged tensors into a directory, which is there, as safetensors, or to another writer.

    Raises:
        HalfbyteError: a tensor of the base or of an adapter cannot be read, or what comes out of it is not finite; an
            adapter changes what the base's files have under no name of its own.
    """
    _check_changes(base, changes)
    _check_layers(base, settings)
    return _Merge(base, changes, settings).write(output)


class _Merge:
    """The merge of one model, and what is known of it so far."""

    def __init__(self, base: BaseWeights, changes: Mapping[str, Sequence[Change]], settings: Settings) -> None:
        self.base, self.changes, self.settings = base, changes, settings
        self.parameters = dict(base.model.named_parameters(remove_duplicate=False))
        self.untied = untied_names(base, changes)
        whole = not base.conversions.several
        self.digest = hashlib.sha256() if settings.fingerprint and whole else None
        self.written: set[str] = set()

    def write(self, output: Path | AbstractContextManager[TensorWriter]) -> MergedWeights:
        with self._shards(output) if isinstance(output, Path) else output as writer:
            for _, own in self.base.modules_in_order():
                self._write_module(writer, own)
            rest = [name for name in self.base.file_names.values() if name not in self.written]
            for file_name in (*rest, *self.base.conversions.several, *self.base.conversions.unknown):
                self._write_as_it_is(writer, file_name)
        return MergedWeights(
            bytes=writer.total_bytes,
            files=writer.files,
            tensors=writer.tensors,
            changed=sum(1 for changes in self.changes.values() if changes),
            base_sha256=None if self.digest is None else self.digest.hexdigest(),
            untied=bool(self.untied),
        )

    def _shards(self, directory: Path) -> ShardWriter:
        conversions = self.base.conversions
        names = {*self.base.file_names.values(), *conversions.several, *conversions.unknown, *self.untied}
        for name in conversions.parts.keys() | self.base.layout.layers:
            names |= self.base.take_apart(name, self.parameters[name], name).keys()
        keys = len(names) * (1 if self.settings.layout is None else _KEYS_A_WEIGHT)
        longest = max(map(len, names), default=0) + 32  # of a constant's suffix
        return ShardWriter(directory, self.settings.shard_bytes, keys, longest)

    def _write_module(self, writer: TensorWriter, own: list[str]) -> None:
        constants: list[Tensor] = []  # a fingerprint has those of a module after its parameters
        for name in own:
            if not self.base.has(name):
                continue  # a part of a tensor that is passed on under its own name
            file_name = self._output_name(name)
            changed = self._changes_of(name)
            is_layer = name in self.base.layout.layers
            quantized = None
            if is_layer and (self.digest is not None or self.settings.onto == "quantized"):
                quantized = self.base.quantized(name)
                self._digest(quantized.packed)
                constants += to_keys(quantized).values()
            elif self.digest is not None:
                self._digest(self.base.original(name).to(self.parameters[name].dtype))
            if file_name is None or file_name in self.written:
                continue
            self.written.add(file_name)
            self._write_parameter(writer, name, file_name, quantized, changed)
        for tensor in constants:
            self._digest(tensor)

    def _write_parameter(
        self,
        writer: TensorWriter,
        name: str,
        file_name: str,
        quantized: QuantizedTensor | None,
        changes: Sequence[Change],
    ) -> None:
        settings, layout = self.settings, self.settings.layout
        in_4_bits = layout is not None and name in layout.layers
        if in_4_bits and not changes and settings.onto == "quantized" and self._is_as_wanted(quantized):
            assert quantized is not None
            _add_quantized(writer, file_name, quantized)
            return
        usual = self.parameters[name].dtype == self.base.model.dtype  # some stay in float32, whatever is asked for
        row_wise = changes and name not in self.base.layout.transposed and are_row_wise(changes, settings.combination)
        if row_wise and usual and not in_4_bits:
            self._add_parts(writer, name, file_name, self._merge_by_rows(name, quantized, changes))
            return
        if quantized is not None and settings.onto == "quantized":
            weight = quantized.dequantize(torch.float32)
            if name in self.base.layout.transposed:
                weight = weight.T
        else:
            weight = self.base.original(name)
        if changes:
            expected = weight.shape
            weight = apply_changes(weight.to(torch.float32, copy=True), changes, settings.combination, settings.density)
            if weight.shape != expected:
                raise HalfbyteError(
                    f"{changes[0].adapter.directory}: {name} is {tuple(weight.shape)} where {self.base.source.path} has"
                    f" {tuple(expected)}."
                )
            self._check_finite(name, weight)
        if in_4_bits:
            assert layout is not None
            assert layout.settings is not None
            rows = weight.float().T if name in layout.transposed else weight.float()
            wanted = layout.settings
            try:
                codes = quantize_4bit(rows, wanted.quant_type, wanted.block_size, wanted.double_quant)
            except HalfbyteError as error:
                raise HalfbyteError(f"{self.base.source.path}: {name}: {error}") from error
            _add_quantized(writer, file_name, replace(codes, dtype=settings.dtype or torch.bfloat16))
        else:
            rounded = weight.to(settings.dtype) if usual and settings.dtype is not None else weight
            del weight
            self._add_parts(writer, name, file_name, rounded)

    def _add_parts(self, writer: TensorWriter, name: str, file_name: str, weight: Tensor) -> None:
        for part_name, part in self.base.take_apart(name, weight, file_name).items():
            writer.add(part_name, part)

    def _merge_by_rows(self, name: str, quantized: QuantizedTensor | None, changes: Sequence[Change]) -> Tensor:
        """The merged weight in the output's dtype, float32 where the writer rounds; some rows at a time."""
        if quantized is not None and self.settings.onto == "quantized":
            slices, shape = quantized.row_slices(_SLICE_VALUES), quantized.shape
        else:
            weight = self.base.original(name)
            step, shape = max(1, _SLICE_VALUES // weight.shape[1]), weight.shape
            slices = (
                (begin, weight[begin : begin + step].to(torch.float32, copy=True))
                for begin in range(0, len(weight), step)
            )
        merged = torch.empty(shape, dtype=self.settings.dtype or torch.float32)
        with _one_thread():
            apply_to_rows(slices, changes, merged)
        self._check_finite(name, merged)
        return merged

    def _check_finite(self, name: str, weight: Tensor) -> None:
        if weight.numel() and not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise HalfbyteError(f"{self.base.source.path}: {name} holds a NaN or an infinity once it is merged.")

    def _write_as_it_is(self, writer: TensorWriter, file_name: str) -> None:
        """A buffer, or what the model has in several parameters."""
        if self.base.is_4bit(file_name):
            raise HalfbyteError(
                f"{self.base.source.path}: {file_name} is in 4 bits and is no parameter of the model; name the 16-bit"
                " original of the model."
            )
        tensor = self.base.read(file_name)
        if tensor.is_floating_point() and tensor.ndim > 1 and self.settings.dtype is not None:
            tensor = tensor.to(self.settings.dtype)
        writer.add(file_name, tensor)

    def _changes_of(self, name: str) -> Sequence[Change]:
        if name in self.base.tied and name not in self.untied:
            return [change for other in self.base.tied[name] for change in self.changes.get(other, ())]
        return self.changes.get(name, ())

    def _output_name(self, name: str) -> str | None:
        """Where a parameter is written; None for a tied one that is written as another."""
        if name in self.base.tied and name not in self.untied:
            return self.base.file_name(name)
        return self.base.file_names.get(name) or self.base.conversions.whole_name(name)

    def _is_as_wanted(self, quantized: QuantizedTensor | None) -> bool:
        wanted = None if self.settings.layout is None else self.settings.layout.settings
        if quantized is None or wanted is None:
            return False
        nested = not isinstance(quantized.absmax, Tensor)
        found = quantized.quant_type, quantized.block_size, nested
        return found == (wanted.quant_type, wanted.block_size, wanted.double_quant)

    def _digest(self, tensor: Tensor) -> None:
        if self.digest is not None:
            self.digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For slices so small that waiting for a second thread takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_changes(base: BaseWeights, changes: Mapping[str, Sequence[Change]]) -> None:
    for name, found in changes.items():
        if not found:
            continue
        if not base.has(name):
            raise HalfbyteError(
                f"{base.source.path} holds no tensor {name}, which {found[0].adapter.directory} changes; it is a part"
                " of one that the model takes apart, and such adapters cannot be merged."
            )
        whole = [change for change in found if change.saved is not None or _is_dora(change)]
        if whole and len(found) > 1:
            raise HalfbyteError(
                f"{name} is trained as a whole by {whole[0].adapter.directory}, and another adapter changes it too;"
                " merge one of them."
            )


def _check_layers(base: BaseWeights, settings: Settings) -> None:
    in_4_bits = base.layout.layers if settings.onto == "quantized" else frozenset()
    if settings.layout is not None:
        in_4_bits |= settings.layout.layers
    for file_name, names in base.conversions.several.items():
        if in_4_bits.intersection(names):
            raise HalfbyteError(
                f"{base.source.path}: {file_name} is several layers of the model, and is not quantized as they are;"
                " use --base original and --dtype bfloat16."
            )


def untied_names(base: BaseWeights, changes: Mapping[str, Sequence[Change]]) -> set[str]:
    """Names of parameters that were one tensor in the base and are no longer, since adapters change one of them."""
    untied = {name for name in base.tied if any(_separates(change) for change in changes.get(name, ()))}
    return untied | {other for name in untied for other in base.tied[name]}


def _is_dora(change: Change) -> bool:
    return change.low_rank is not None and change.low_rank.magnitude is not None


def _separates(change: Change) -> bool:
    """Whether a change of one of two tied parameters is no change of the other."""
    if change.adapter.config.ensure_weight_tying:
        return False
    return change.low_rank is not None or change.saved is not None


def _add_quantized(writer: TensorWriter, file_name: str, quantized: QuantizedTensor) -> None:
    writer.add(file_name, quantized.packed)
    for suffix, tensor in to_keys(quantized).items():
        writer.add(f"{file_name}.{suffix}", tensor)
