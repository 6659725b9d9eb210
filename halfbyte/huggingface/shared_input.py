"""Layers that read the same tensor: q, k and v of an attention, gate and up of an MLP.

A model calls them one after the other. Whichever is called first computes all of them, and the others find their
output waiting. Who reads what is found by experiment: one forward of two tokens, in which every layer only notes its
input and gives zeros back, so that no weight is touched.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.huggingface.stand_ins import output_shape, stand_ins


class SharedInput:
    """The outputs of one group of layers for the input that they were last given."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers: list[Any] = list(layers)
        self._waiting: dict[int, Tensor] = {}  # by the place in the group: computed and not yet asked for
        self._computed_from: tuple[Tensor, int, bool] | None = None

    def output_of(
        self, layer: nn.Module, x: Tensor, compute_all: Callable[[Sequence[Any], Tensor], Sequence[Tensor]]
    ) -> Tensor:
        """The layer's output for `x`, from `compute_all(layers, x)` now or when the first of them was asked."""
        place = next(i for i, other in enumerate(self.layers) if other is layer)
        if not (self._is_of(x) and place in self._waiting):
            self._waiting = dict(enumerate(compute_all(self.layers, x)))
            self._computed_from = x, x._version, torch.is_grad_enabled()
        output = self._waiting.pop(place)
        if not self._waiting:
            self._computed_from = None
        return output

    def _is_of(self, x: Tensor) -> bool:
        if self._computed_from is None:
            return False
        before, version, with_grad = self._computed_from
        return before is x and version == x._version and with_grad == torch.is_grad_enabled()


def find_shared_inputs(model: nn.Module, kind: type[nn.Module]) -> list[list[nn.Module]]:
    """The layers of `kind` that stand side by side in one module and read one tensor; none if the model needs more
    than ids to run."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(layer: nn.Module, x: Tensor) -> Tensor:
        seen.append((layer, x))  # and so kept: no other tensor can take its place in memory meanwhile
        return x.new_zeros(output_shape(layer, x))

    modes = {module: module.training for module in model.modules()}  # they may differ: PEFT's wrapper is in training
    model.eval()
    try:
        with torch.no_grad(), stand_ins(model, kind, note):
            parameter = next(model.parameters())
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=parameter.device), use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return []
    finally:
        for module, training in modes.items():
            module.training = training
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    groups: dict[tuple[int, int], list[nn.Module]] = {}
    for layer, x in seen:
        groups.setdefault((id(parents[layer]), id(x)), []).append(layer)
    calls = Counter(layer for layer, _ in seen)
    return [group for group in groups.values() if len(group) > 1 and all(calls[layer] == 1 for layer in group)]
