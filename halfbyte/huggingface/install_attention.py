"""Puts halfbyte's attention into a model, after seeing that it computes what the model's own does.

The model is run twice on two short rows, one of them padded on the left: as it is, and with halfbyte's masks, and with
random numbers for the outputs of its 4-bit layers, so that none of those weights has to be read. Every
layer's queries, keys and values of the first run are then attended by both, each with its own mask, and held against
the model's own attention in float32: ours may be no further from that than twice what the model's own is in the
model's type, in outputs and gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halfbyte.huggingface.attention import NAME, eager_of, halfbyte_attention, register, uncounted
from halfbyte.huggingface.attention_mask import halfbyte_mask
from halfbyte.huggingface.stand_ins import output_shape, stand_ins
from halfbyte.nn import Linear4bit

_PROBE = "halfbyte_probe"
_TOKENS, _PADDING = 19, 5

Attend = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    inputs: tuple[Tensor, Tensor, Tensor]  # query, key, value
    mask: Tensor | None
    kwargs: dict[str, Any]


def use_attention(model: PreTrainedModel) -> str:
    """Make `halfbyte` the attention of a transformers model, or of PEFT's wrapper of one; says in words what was done.

    The model is left as it was if it is not on the CPU, takes no other attention, or if the two differ.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = model.config._attn_implementation
    if before == NAME:
        return "attention: halfbyte, as before"
    if model.device.type != "cpu":
        return f"attention: {before}; halfbyte's runs on a CPU and the model is on {model.device}"
    if not model._can_set_attn_implementation():
        return f"attention: {before}; {type(model).__name__} takes no other"
    register()
    try:
        with uncounted():
            layers, difference = _compare(model, before)
    except Exception as error:  # the model's own code on inputs of our making: anything can be raised there
        return f"attention: {before}; halfbyte's could not be tried on {type(model).__name__} ({error})"
    if difference:
        return f"attention: {before}; halfbyte's differs from it in {difference}"
    model.set_attn_implementation(NAME)
    return f"attention: halfbyte in place of {before}; {layers} layers checked, outputs and gradients agree"


def _compare(model: PreTrainedModel, before: str) -> tuple[int, str]:
    """How many layers there are, and what differs first; empty where all agree."""

    def original(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        attend: Attend = ALL_ATTENTION_FUNCTIONS.get_interface(before, eager_of(module))
        return attend(module, *args, **kwargs)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, _TOKENS), generator=generator)
    token = torch.ones(2, _TOKENS, dtype=torch.bool)
    token[1, :_PADDING] = False
    theirs = _calls_of(model, ids, token, original, ALL_MASK_ATTENTION_FUNCTIONS[before])
    ours = _calls_of(model, ids, token, halfbyte_attention, halfbyte_mask)
    for layer, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        dout = torch.randn(their.inputs[0].shape, generator=generator).transpose(1, 2) * token[:, :, None, None]
        exact = _differentiate(original, their, their.mask, dout, torch.float32)
        usual = _differentiate(original, their, their.mask, dout, their.inputs[0].dtype)
        result = _differentiate(halfbyte_attention, their, our.mask, dout, their.inputs[0].dtype)
        slack = max(torch.finfo(their.inputs[0].dtype).eps / 2, 1e-5)
        for name, want, base, got in zip(("output", "dq", "dk", "dv"), exact, usual, result, strict=True):
            if name == "output":  # what padding attends to is nobody's business
                want, base, got = (x * token[:, :, None, None] for x in (want, base, got))
            allowed = 2 * (base - want).abs().max() + slack * want.abs().max()
            if not (got - want).abs().max() <= allowed:  # a NaN is no agreement
                return len(theirs), f"the {name} of layer {layer}"
    return len(theirs), ""


def _calls_of(
    model: PreTrainedModel, ids: Tensor, token: Tensor, attend: Attend, make_mask: Callable[..., Any]
) -> list[_Call]:
    calls: list[_Call] = []

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        calls.append(_Call(module, (query, key, value), mask, kwargs))
        return attend(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, make_mask)
    generator = torch.Generator().manual_seed(1)

    def random_output(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.randn(output_shape(layer, x), generator=generator).to(x.dtype)

    with _evaluating(model), torch.no_grad(), stand_ins(model, Linear4bit, random_output):
        model(input_ids=ids, attention_mask=token.long(), use_cache=False)
    return calls


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    before, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation(_PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


def _differentiate(
    attend: Attend, call: _Call, mask: Tensor | None, dout: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v, in float32."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    with torch.enable_grad():
        inputs = [x.detach().to(dtype).requires_grad_() for x in call.inputs]
        out = attend(call.module, *inputs, mask, **call.kwargs)[0]
        gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
    return tuple(x.detach().float() for x in (out, *gradients))
