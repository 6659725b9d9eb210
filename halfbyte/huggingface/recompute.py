"""What the backward pass finds in memory, and what it computes again.

    none          all that a backward needs is kept
    elementwise   in each layer the outputs of products and of attention are kept; norms, activations, gates and the
                  rotary embedding, which cost little, are computed again
    full          each layer keeps its input alone, and its whole forward is run again.  Chen et al. (arXiv 1604.06174)

The gradients are the same bits at every level: a mask of dropout is drawn from a generator whose state is restored.
What a level takes is measured by forwards of a few tokens and is linear in tokens, as long as attention keeps nothing
that is quadratic in them; halfbyte's does not.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from halfbyte.errors import HalfbyteError
from halfbyte.nn import supervised_loss

LEVELS = ("none", "elementwise", "full")  # from the fastest to the smallest
_PROBE_TOKENS = 64

# What is kept at level elementwise, by name: what costs more to compute again than to hold.
_PRODUCTS = (
    "halfbyte::matmul_4bit",
    "halfbyte::matmul_dense",
    "halfbyte::attention",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
)


def set_recomputation(model: nn.Module, level: str) -> None:
    """Make the layers of transformers' `model`, or of PEFT's wrapper of one, keep and recompute as `level` says.

    Raises:
        HalfbyteError: the model has no layers that transformers can recompute.
    """
    if level == "none":
        model.activation_checkpointing_disable()  # type: ignore[operator]
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if level == "elementwise":
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    except ValueError as error:
        raise HalfbyteError(
            "gradient_checkpointing is true, but transformers cannot recompute the layers of this model; set it to"
            " auto."
        ) from error


def measure_activation_bytes(model: nn.Module) -> dict[str, float]:
    """Level -> peak bytes of activations a token of a micro-batch, for the levels that the model can be run at.

    Leaves the model at level none, without gradients, and torch's random state as it was.
    """
    layers: int = model.config.get_text_config().num_hidden_layers  # type: ignore[operator,union-attr]
    return peak_activation_bytes(probe_activations(model), layers)


def peak_activation_bytes(saved: Mapping[str, float], layers: int) -> dict[str, float]:
    """What is there at most in a backward pass, of what `probe_activations` finds; as `measure_activation_bytes`."""
    if "full" not in saved:
        return {"none": saved["none"]}
    # One layer is computed again at a time, and its backward holds gradients of about as much.
    layer = (saved["none"] - saved["full"]) / layers
    peaks = {"none": saved["none"] + layer, "full": saved["full"] + 2 * layer}
    if "products" in saved:
        kept = saved["products"]
        peaks["elementwise"] = saved["full"] + kept + 2 * layer - kept / layers  # they are a part of its layer
    return peaks


def probe_activations(model: nn.Module) -> dict[str, float]:
    """Bytes a token that a forward pass keeps: at level `none`, at `full`, and `products`, which are kept between them.

    Each is linear in the number of layers. Without `full` where the model cannot be recomputed, without `products`
    where they cannot be kept. Leaves the model as `measure_activation_bytes` does.
    """
    random_state, training = torch.get_rng_state(), model.training
    model.train()
    try:
        products = _CountProducts()
        set_recomputation(model, "none")
        with products:
            saved = {"none": _probe(model)}
        try:
            set_recomputation(model, "full")
        except HalfbyteError:
            return saved
        saved["full"] = _probe(model)
        set_recomputation(model, "elementwise")
        try:
            _probe(model, backward=True)
        except RuntimeError:  # a model that changes in place what a product put out, so that it cannot be kept
            return saved
        return saved | {"products": products.bytes / _PROBE_TOKENS}
    finally:
        set_recomputation(model, "none")
        model.zero_grad(set_to_none=True)
        model.train(training)
        torch.set_rng_state(random_state)


def choose_recomputation(
    bytes_a_token: Mapping[str, float],  # what `measure_activation_bytes` found
    tokens: int,  # of the largest micro-batch, padding included
    budget_bytes: float,
) -> str:
    """The fastest level whose activations fit the budget; the smallest there is if none does."""
    levels = [level for level in LEVELS if level in bytes_a_token]
    return next((level for level in levels if bytes_a_token[level] * tokens <= budget_bytes), levels[-1])


def _probe(model: nn.Module, backward: bool = False) -> float:
    """Bytes a token that autograd saves in a forward of a short row, of which all is supervised."""
    device = next(model.parameters()).device
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(_PROBE_TOKENS, device=device)[None],
        "labels": ids,
    }
    with _count_saved(model) as saved:
        loss = supervised_loss(model, batch)
    if backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return saved.bytes / _PROBE_TOKENS


def _keep_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_product(operation: Any) -> bool:
    return operation.name().split(".")[0] in _PRODUCTS


class _CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that products put out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        if _is_product(operation):
            tensors = output if isinstance(output, tuple) else (output,)
            self.bytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return output


class _Saved:
    bytes = 0


@contextmanager
def _count_saved(model: nn.Module) -> Iterator[_Saved]:
    """Adds up what autograd saves, each storage once, without what the model holds anyway."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = []  # so that no address is given out a second time
    saved = _Saved()

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(storage)
            saved.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield saved
