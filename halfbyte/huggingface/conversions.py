"""Which parameter of a model each tensor of its files is, by transformers' own conversions, and one at a time.

    one tensor is one parameter             what most are; its name may be another
    several tensors are one parameter       a mixture's experts: w1 and w3 of each are the layer's gate_up_proj
    one tensor is several parameters        projections that the files fuse and the model does not

The second kind is put together in memory, one parameter at a time, as a load does it, and taken apart under the names
that its tensors had. The third is not done here: its tensors are told by name.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)


class Conversions:
    """The names of a model's files, and of its parameters."""

    def __init__(self, model: PreTrainedModel, file_names: Iterable[str]) -> None:
        """
        Args:
            model: on the meta device.
            file_names: of all tensors, without the constants of 4-bit weights.
        """
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._model = model
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.named: dict[str, str] = {}  # the model's name -> the files', of what is one tensor
        self.parts: dict[str, dict[str, list[str]]] = {}  # of what is several: its tensors' names by their patterns
        self.several: dict[str, list[str]] = {}  # a tensor of the files -> the parameters that it is
        self.unknown: list[str] = []  # tensors that the model has no place for
        known = model.state_dict()
        for file_name in sorted(file_names, key=dot_natural_key):
            self._place(file_name, renamings, known)
        used = [renaming for renaming in renamings if renaming.was_used()]
        self._back = [renaming.reverse_transform() for renaming in reversed(used)]

    def _place(self, file_name: str, renamings: list[WeightRenaming], known: dict[str, Tensor]) -> None:
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(file_name, renamings, self._converters, prefix, known)
        if name not in known and file_name in known:
            name, pattern = file_name, None
        if name not in known:
            self.unknown.append(file_name)
        elif pattern is None:
            self.named[name] = file_name
        else:
            by_pattern = {source: each for each in self._converters for source in each.source_patterns}
            first, *others = by_pattern[pattern].target_patterns
            if others:
                self.several[file_name] = [name.replace(first, pattern) for pattern in (first, *others)]
            else:
                self.parts.setdefault(name, {}).setdefault(pattern, []).append(file_name)

    def whole_name(self, name: str) -> str:
        """What a file calls a parameter that it has as one tensor, though the model's files usually do not."""
        return self.named.get(name) or apply_renamings(name, self._back)

    def fuses(self, name: str) -> bool:
        """Whether the files of such a model, though perhaps not these, have several tensors for a parameter."""
        return self._converter_of(name) is not None

    def fuse(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """A parameter of `parts`, from its tensors.  Raises RuntimeError where these do not fit together."""
        converter = self._converter_of(name)
        assert converter is not None, "it is one of the parts"
        for pattern, file_names in self.parts[name].items():
            for file_name in file_names:
                converter.add_tensor(name, file_name, pattern, partial(read, file_name))
        (tensor,) = converter.convert(name, model=self._model, config=self._model.config).values()
        return _only(tensor)

    def take_apart(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors, by their names in files, that a parameter is there; it is one that `fuses`."""
        converter = self._converter_of(name)
        assert converter is not None, "whoever calls this has asked"
        reverse = converter.reverse_transform()
        renamed, pattern = reverse.rename_source_key(name)
        reverse.add_tensor(renamed, name, pattern, tensor)
        apart = reverse.convert(renamed, model=self._model, config=self._model.config)
        own = {file_name for each in self.parts.get(name, {}).values() for file_name in each}
        named: dict[str, Tensor] = {}
        for part, value in apart.items():
            part_name = apply_renamings(part, self._back)
            short = part_name.removeprefix(f"{self._model.base_model_prefix}.")  # some files leave it out
            named[short if short in own else part_name] = _only(value)
        return named

    def _converter_of(self, name: str) -> WeightConverter | None:
        """What makes a parameter of several tensors; a copy, since transformers collects the tensors in it."""
        for converter in self._converters:
            if len(converter.target_patterns) == 1:
                _, pattern = converter.reverse_transform().rename_source_key(name)
                if pattern is not None:
                    return copy.deepcopy(converter)
        return None


def _only(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value
