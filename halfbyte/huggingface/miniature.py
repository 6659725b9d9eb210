"""Miniatures of a model: its own layers in their full width, but few of them, with constants in place of weights.

What a layer keeps for the backward pass, and how long it takes, does not depend on the numbers in it. So a miniature
with one layer of each kind, and others with some more of one kind, are run in place of the model, and what is measured
on them is carried on to the model's own number of layers: it is linear in that. No weight is read, and next to no
memory is taken: all matrices are one mapping of pages that nobody ever writes to, which is how a model that
is larger than the machine can be measured on it.
"""

import copy
import math
import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from halfbyte.huggingface.outline import decoder_layers, kinds_of_layers, values_a_layer
from halfbyte.huggingface.patch import accelerate_model
from halfbyte.huggingface.peft import share_inputs
from halfbyte.huggingface.recompute import peak_activation_bytes, probe_activations, set_recomputation
from halfbyte.nn import PackedWeights, supervised_loss
from halfbyte.optim import AdamW
from halfbyte.quant import DoubleQuantized, QuantizedTensor

_VALUES = 3e8  # in the layers that a longer miniature has more: enough of them for a time that stands out of the noise
_MOST_LAYERS = 8
_WEIGHT = 0.02  # every value of a layer in 4 bits


@dataclass(frozen=True)
class Family:
    """The miniatures of one model."""

    shortest: PeftModel  # a layer of each kind, or all layers where they cannot be told apart
    longer: tuple[tuple[PeftModel, float], ...]  # with more of one kind; how many times that surplus the model has

    @property
    def nbytes(self) -> int:
        """What the miniatures themselves hold, which is their adapters."""
        models = [self.shortest, *(model for model, _ in self.longer)]
        return sum(p.nbytes for model in models for p in model.parameters() if p.requires_grad)

    def extrapolate(self, measure: Callable[[PeftModel], Mapping[str, float]]) -> dict[str, float]:
        """What the whole model would measure, key by key, for keys that every miniature has."""
        first = measure(self.shortest)
        measured = [(measure(model), times) for model, times in self.longer]
        return {
            key: value + sum(times * (of_longer[key] - value) for of_longer, times in measured)
            for key, value in first.items()
            if all(key in of_longer for of_longer, _ in measured)
        }


def make_miniatures(outline: PeftModel) -> Family:
    """Raises whatever the model's own code does, if it does not bear to have few layers."""
    kinds = kinds_of_layers(outline)
    first = sorted(places[0] for places in kinds)
    longer = []
    for places in kinds:
        left = len(places) - 1
        if left:
            more = min(left, _MOST_LAYERS, max(1, int(_VALUES / values_a_layer(outline, places[0]))))
            longer.append((_miniature(outline, sorted(first + places[1 : 1 + more])), left / more))
    return Family(_miniature(outline, first), tuple(longer))


def predict_activation_bytes(family: Family, layers: int) -> dict[str, float]:
    """What `measure_activation_bytes` would find on the whole model: level -> bytes a token of a micro-batch."""
    return peak_activation_bytes(family.extrapolate(probe_activations), layers)


def time_pass(family: Family, level: str, rows: int, length: int, seconds: float) -> dict[str, float]:
    """Seconds that a forward and a backward pass of `rows` × `length` tokens take on this machine, and an update.

    `pass`, and `update`, of the adapters by the optimizer. Takes about `seconds`, and longer only where a pass of one
    row does: then one row is timed, and the rest is multiplication.
    """
    models = [family.shortest, *(model for model, _ in family.longer)]
    began = time.perf_counter()
    for model in models:
        set_recomputation(model, level)
        _pass_seconds(model, 1, min(length, 64))  # what happens the first time only
    best = {id(model): _pass_seconds(model, 1, length) for model in models}
    timed_rows = rows if sum(best.values()) * rows < seconds / 3 else 1
    if timed_rows > 1:
        best = {id(model): _pass_seconds(model, rows, length) for model in models}
    while time.perf_counter() - began + sum(best.values()) < seconds:
        for model in models:  # in turns, so that all of them see the same machine
            best[id(model)] = min(best[id(model)], _pass_seconds(model, timed_rows, length))
    whole = family.extrapolate(lambda model: {"pass": best[id(model)]})["pass"] * rows / timed_rows
    return {"pass": whole, "update": _update_seconds_a_value(models[-1])}


def _pass_seconds(model: PeftModel, rows: int, length: int) -> float:
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    ids = (torch.arange(rows * length) % vocabulary).view(rows, length)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length).repeat(rows, 1),
        "labels": ids,
    }
    model.train()
    began = time.perf_counter()
    supervised_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    took = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return took


def _update_seconds_a_value(model: PeftModel) -> float:
    """Of AdamW with moments of 32 bits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained)
    took = math.inf
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        began = time.perf_counter()
        optimizer.step()
        took = min(took, time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    values: int = sum(parameter.numel() for parameter in trained)
    return took / max(1, values)


# ── Making one ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _miniature(outline: PeftModel, places: list[int]) -> PeftModel:
    """The outline with the layers at these places; with all that it has where none are known."""
    with _only_layers(outline, places):
        model: PeftModel = copy.deepcopy(outline)
    if places:
        config = model.get_base_model().config.get_text_config()
        types = getattr(config, "layer_types", None)
        config.num_hidden_layers = len(places)
        if isinstance(types, list | tuple):
            config.layer_types = [types[place] for place in places]
    _fill(model)
    base = model.get_base_model()
    base.eval()
    embedding = base.get_input_embeddings()
    # Whether a kernel may stand for the model's own code is found by experiment, which needs numbers that differ.
    hook = embedding.register_forward_hook(_random_output)
    try:
        accelerate_model(base)
        share_inputs(model)
    finally:
        hook.remove()
    return model


@contextmanager
def _only_layers(model: PeftModel, places: list[int]) -> Iterator[None]:
    """The model with some of its layers, for as long as it takes to copy it."""
    layers = decoder_layers(model)
    if layers is None:
        yield
        return
    every = layers._modules
    layers._modules = {str(i): every[str(place)] for i, place in enumerate(places)}
    try:
        yield
    finally:
        layers._modules = every


def _random_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(output.shape, generator=generator).to(output.dtype)


def _fill(model: nn.Module) -> None:
    """Constants for every tensor without numbers: ones in vectors, random adapters, one mapping for all matrices."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "meta"]
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    pages = mmap.mmap(-1, max(largest, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.zeros(shape, dtype=dtype)
        return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)

    for module in model.modules():
        if isinstance(module, PackedWeights):
            for name in [name for name in module.shapes if getattr(module, name).is_meta]:
                module.set_quantized(name, _constant_weight(module, name, zeros))
    made: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                filled = _numbers(parameter, zeros)
                made[id(parameter)] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = _numbers(buffer, zeros)


def _numbers(like: Tensor, zeros: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Tensor:
    shape = tuple(like.shape)
    if like.requires_grad:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(_WEIGHT).to(like.dtype)
    return torch.ones(shape, dtype=like.dtype) if like.ndim <= 1 else zeros(shape, like.dtype)


def _constant_weight(
    layer: PackedWeights, name: str, zeros: Callable[[tuple[int, ...], torch.dtype], Tensor]
) -> QuantizedTensor:
    """Codes of zero, which NF4 has as -1, times one scale for all blocks."""
    shape = layer.shapes[name]
    blocks = -(-shape.numel() // layer.block_size)
    absmax: Tensor | DoubleQuantized
    if layer.double_quant:
        absmax = DoubleQuantized(zeros((blocks,), torch.uint8), zeros((-(-blocks // 256),), torch.float32), _WEIGHT)
    else:
        absmax = torch.full((blocks,), _WEIGHT)
    packed = zeros(tuple(getattr(layer, name).shape), torch.uint8)
    return QuantizedTensor(packed, absmax, shape, layer.compute_dtype, layer.quant_type, layer.block_size)
