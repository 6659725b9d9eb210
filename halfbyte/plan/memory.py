"""What a run holds, part by part, and when it holds most.

    process        Python and its libraries
    4-bit weights  4 + 8/64 + 32/(64·256) = 4.127 bits a value with double quantization.  QLoRA (arXiv 2305.14314)
    16-bit rest    embeddings, output layer, norms, biases
    adapters       4 bytes a value, and as many for the gradient
    optimizer      8 bytes a value, or 2.03 in 8 bits; where it is paged it leaves memory when that runs short
    activations    bytes a token and level of recomputation, times the tokens of a micro-batch; offloaded to disk, the
                   inputs of layers leave memory as paged state does
    temporaries    a chunk of logits, what the kernels work in

The peak is the largest of the moments of a run. Loading holds what is loaded so far and one tensor in 16 bits; a step
holds everything at the end of its forward pass; an evaluation has no gradients and keeps one layer's activations.

What is a page of a file counts for as long as there is room: paged state, offloaded inputs, and the weights of a 4-bit
checkpoint, which are mapped. Where memory is short they leave it, so that a run is possible wherever the rest of it
fits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch

from halfbyte.optim import AdamW

LEVELS = ("none", "elementwise", "full")  # of recomputation, from the fastest to the smallest
LOGITS_BYTES = 32 << 20  # what the loss works in
_SCRATCH_BYTES = 2 << 20  # of a thread, in the kernels' products
_8_BITS_OF_16 = (1 + 4 / 256) / 2  # a code a value, and a float32 absmax for 256 of them
_LOADING_COPIES = 2  # of a tensor that is being quantized: as it is read, and as the kernel wants it


@dataclass(frozen=True)
class Footprint:
    """A model with adapters and what a token costs in it: all that does not depend on how it is trained."""

    quantized_bytes: int
    remainder_bytes: int
    largest_tensor_bytes: int  # in 16 bits
    adapter_sizes: tuple[int, ...]  # values of each trained tensor
    adapter_rank: int  # that the sizes are of
    layers: int
    vocabulary: int
    activation_bytes: Mapping[str, float]  # level -> a token of a micro-batch; the levels that the model has
    process_bytes: int
    threads: int
    mapped_bytes: int = 0  # of the model: pages of its files. Then nothing is quantized while it is loaded

    @property
    def model_bytes(self) -> int:
        return self.quantized_bytes + self.remainder_bytes

    @property
    def layer_bytes(self) -> float:
        """A token's activations in one layer: what recomputing all saves, spread over the layers."""
        saved = self.activation_bytes["none"] - self.activation_bytes.get("full", 0.0)
        return saved / max(1, self.layers - 1)


@dataclass(frozen=True)
class Settings:
    """How it is trained."""

    rows: int  # of a micro-batch
    accumulation: int  # micro-batches that make up a step
    length: int  # tokens of the longest row
    level: str
    state_bits: int
    paged: bool
    rank: int  # of the adapters
    offloading: str = "none"  # of layers' inputs at level full: to `disk`, or in `8bit`
    evaluated_rows: int = 0  # held-out rows in one pass; 0: none are evaluated
    evaluated_length: int = 0  # tokens of the longest of them

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Plan:
    """A run, and the memory that it may take."""

    footprint: Footprint
    settings: Settings
    budget_bytes: int

    def parts(self) -> dict[str, int]:
        """What is in memory at the end of a forward pass, in the order in which it comes there."""
        footprint, settings = self.footprint, self.settings
        sizes = self.trained_sizes()
        tokens = settings.tokens
        return {
            "process": footprint.process_bytes,
            "4-bit weights": footprint.quantized_bytes,
            "16-bit remainder": footprint.remainder_bytes,
            "adapters": 4 * sum(sizes),
            "gradients": 4 * sum(sizes),
            "optimizer state": optimizer_bytes(sizes, settings.state_bits),
            "activations": round(footprint.activation_bytes[settings.level] * tokens - self._saved_by_8_bits()),
            "temporaries": min(LOGITS_BYTES, 2 * tokens * footprint.vocabulary) + footprint.threads * _SCRATCH_BYTES,
        }

    def moments(self) -> dict[str, int]:
        """Bytes at the times that can be the peak.  Pages of files count for as long as there is room for them."""
        parts, footprint, settings = self.parts(), self.footprint, self.settings
        copies = 0 if footprint.mapped_bytes else _LOADING_COPIES
        loading = parts["process"] + footprint.model_bytes + copies * footprint.largest_tensor_bytes
        moments = {"loading the model": loading, "a training step": sum(parts.values())}
        if settings.evaluated_rows:
            without = parts["gradients"] + parts["activations"]
            layer = footprint.layer_bytes * settings.evaluated_rows * settings.evaluated_length
            moments["an evaluation"] = round(moments["a training step"] - without + layer)
        return moments

    @property
    def peak_bytes(self) -> int:
        return max(self.moments().values())

    @property
    def peak_moment(self) -> str:
        moments = self.moments()
        return max(moments, key=moments.__getitem__)

    @property
    def least_bytes(self) -> int:
        """The peak when memory is short: without the pages of files."""
        return self._peak_without_state() - self.footprint.mapped_bytes

    @property
    def fits(self) -> bool:
        return self.least_bytes <= self.budget_bytes

    @property
    def stays(self) -> bool:
        """Whether it fits with its weights in memory, so that no step has to read them again."""
        return self._peak_without_state() <= self.budget_bytes

    @property
    def activation_budget(self) -> int:
        """What the budget leaves for activations, if the weights are to stay in memory."""
        parts = self.parts()
        return self.budget_bytes - sum(parts.values()) + parts["activations"] + self._paged_state()

    def _peak_without_state(self) -> int:
        state = self._paged_state()
        pages = {"a training step": state + self._paged_inputs(), "an evaluation": state}
        return max(size - pages.get(name, 0) for name, size in self.moments().items())

    def _paged_state(self) -> int:
        return self.parts()["optimizer state"] if self.settings.paged else 0

    def _kept_inputs(self) -> float:
        """Bytes of the layers' inputs, which are what is kept at level full beside two layers' working."""
        footprint = self.footprint
        a_token = footprint.activation_bytes[self.settings.level] - 2 * footprint.layer_bytes
        return max(0.0, a_token) * self.settings.tokens if self.settings.level == "full" else 0.0

    def _paged_inputs(self) -> int:
        return round(self._kept_inputs()) if self.settings.offloading == "disk" else 0

    def _saved_by_8_bits(self) -> float:
        return (1 - _8_BITS_OF_16) * self._kept_inputs() if self.settings.offloading == "8bit" else 0.0

    def trained_sizes(self) -> tuple[int, ...]:
        """Values of each trained tensor: those of an adapter are in proportion to its rank."""
        footprint, rank = self.footprint, self.settings.rank
        return tuple(size * rank // footprint.adapter_rank for size in footprint.adapter_sizes)

    def levels(self) -> list[str]:
        """Those of the model, from the fastest to the smallest."""
        return [level for level in LEVELS if level in self.footprint.activation_bytes]

    def with_settings(self, **changes: int | str | bool) -> "Plan":
        return replace(self, settings=replace(self.settings, **changes))  # type: ignore[arg-type]

    def at_fastest_level(self) -> "Plan":
        """At the first level of recomputation that fits the budget with the weights; at the smallest if none does."""
        plans = [self.with_settings(level=level) for level in self.levels()]
        return next((plan for plan in plans if plan.stays), plans[-1])


@cache
def optimizer_bytes(sizes: tuple[int, ...], state_bits: int) -> int:
    """What AdamW keeps of tensors of so many values, by its own account."""
    if not sizes:
        return 0
    parameters = [torch.empty(size, device="meta") for size in sizes]
    optimizer = AdamW(parameters, state_bits=state_bits)
    return sum(tensor.nbytes for parameter in parameters for tensor in optimizer.state_layout(parameter).values())
