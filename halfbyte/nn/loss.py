"""Cross-entropy at the supervised positions alone.

A row of 512 tokens with an answer of 40 needs 40 rows of logits, and over a vocabulary of 49,152 logits are
the largest tensor of a step. The hidden states that go into the output layer are cut down to the positions
that are supervised; where the output layer is a plain linear one and the model does nothing to its logits but
scale and soft-cap them, they never exist as a whole (halfbyte.ops.linear_cross_entropy). What the model does to its
logits is found by experiment: known logits are handed to it, and what comes out is compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import ops

IGNORED = -100  # the label of a position that is not supervised


@dataclass(frozen=True)
class LogitTransform:
    """What a model makes of its output layer's logits z: softcap · tanh(scale · z / softcap), or scale · z."""

    scale: float
    softcap: float  # 0: none

    def __call__(self, logits: Tensor) -> Tensor:
        x = logits * self.scale
        return self.softcap * torch.tanh(x / self.softcap) if self.softcap else x


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward, up to the factor that the backward brings."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float
    ) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        loss, *gradients = ops.linear_cross_entropy(
            hidden, weight, bias, targets, scale, softcap, of_hidden, of_weight or of_bias
        )
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            gradient.mul(grads[0]).to(ctx.dtype) if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return (*scaled, None, None, None)


def linear_cross_entropy(
    hidden: Tensor,  # (n, h)
    weight: Tensor,  # (vocabulary, h), the dtype of hidden
    bias: Tensor | None,  # (vocabulary,), likewise
    targets: Tensor,  # (n,) int64, each in [0, vocabulary)
    logit_scale: float = 1.0,
    softcap: float = 0.0,  # 0: none
) -> Tensor:  # (), float32
    """The sum of the cross-entropies, differentiable once in `hidden`, `weight` and `bias`."""
    if torch.is_grad_enabled():
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, logit_scale, softcap)  # type: ignore[no-untyped-call]
        return loss
    return ops.linear_cross_entropy(hidden, weight, bias, targets, logit_scale, softcap, False)[0]


def supervised_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum, in float32, of the cross-entropy over the batch's supervised positions.

    Args:
        model: a causal language model of transformers', or PEFT's wrapper of one.
        batch: `input_ids`, `attention_mask`, `position_ids` and `labels`, each (rows, length) int64; labels
            are aligned with the ids, as in transformers: position i is predicted from position i − 1.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if is_packed(batch["position_ids"]):
        # transformers keeps packed texts apart by their position ids, but only where it is given no mask.
        del inputs["attention_mask"]
    targets = batch["labels"][:, 1:]
    supervised = targets != IGNORED
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    transform = logit_transform(model)
    if transform is None:
        logits = _supervised_logits(model, output_layer, inputs, supervised)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets[supervised], reduction="sum")

    seen: list[Tensor] = []

    def keep_hidden(hidden: Tensor) -> Tensor:
        seen.append(hidden[:, :-1][supervised])
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    with _replaced_forward(output_layer, keep_hidden):
        model(**inputs, use_cache=False)
    (hidden,) = seen
    return linear_cross_entropy(
        hidden, output_layer.weight, output_layer.bias, targets[supervised], transform.scale, transform.softcap
    )


def is_packed(position_ids: Tensor) -> bool:
    """Whether several texts share a row: their positions, (rows, length), do not count on by one."""
    return bool((position_ids.diff() != 1).any())


def count_supervised(batch: dict[str, Tensor]) -> int:
    """How many positions of a batch enter its loss."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


# By the output layer, which is the same object under whatever wraps the model.
_transforms: "WeakKeyDictionary[nn.Module, LogitTransform | None]" = WeakKeyDictionary()


def logit_transform(model: nn.Module) -> LogitTransform | None:
    """What the model does to its logits, or None if logits must be computed to know.

    None too where the output layer is not a plain linear layer in the dtype of what goes into it. Found by one forward
    of two tokens, and remembered.
    """
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    if type(output_layer) is not nn.Linear or output_layer._forward_hooks or output_layer._forward_pre_hooks:
        return None
    if output_layer not in _transforms:
        _transforms[output_layer] = _find_transform(model, output_layer)
    return _transforms[output_layer]


@torch.no_grad()
def _find_transform(model: nn.Module, output_layer: nn.Linear) -> LogitTransform | None:
    weight = output_layer.weight
    # Two positions of logits: of every size, and among them one small and one large enough to tell scale and cap.
    small, large = 2.0**-10, 1e6
    probe = torch.randn(1, 2, weight.shape[0], generator=torch.Generator().manual_seed(0)) * 20
    probe[0, 0, :2] = torch.tensor([small, large])
    probe = probe.to(weight.device)
    seen: list[tuple[torch.dtype, torch.Size]] = []

    def answer_probe(hidden: Tensor) -> Tensor:
        seen.append((hidden.dtype, hidden.shape))
        return probe

    training = model.training
    model.eval()
    try:
        with _replaced_forward(output_layer, answer_probe):
            ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # a model that needs more than ids
    finally:
        model.train(training)
    if seen != [(weight.dtype, (1, 2, weight.shape[1]))] or logits.shape != probe.shape or logits.dtype != probe.dtype:
        return None
    scale, cap = logits[0, 0, 0].item() / small, logits[0, 0, 1].item()
    transform = LogitTransform(scale, 0.0 if abs(cap - scale * large) <= 1e-3 * abs(cap) else cap)
    return transform if torch.allclose(transform(probe), logits, rtol=1e-5, atol=1e-5) else None


def _supervised_logits(
    model: nn.Module, output_layer: nn.Module | None, inputs: dict[str, Tensor], supervised: Tensor
) -> Tensor:
    def keep_supervised(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :-1][supervised][None], *args[1:])

    hook = output_layer.register_forward_pre_hook(keep_supervised) if output_layer is not None else None
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if logits.shape[:2] == inputs["input_ids"].shape:  # a model that does not call its output layer as a module
        logits = logits[:, :-1][supervised]
    return logits


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")  # an instance's own, if something has put one there
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
