"""What the backward pass finds in memory, and what it computes again.

    none          everything a backward needs is kept
    elementwise   in each layer the outputs of products and of attention are kept; norms, activations and gates,
                  which cost little, are computed again (selective checkpointing)
    full          each layer keeps its input alone, and its whole forward is run again.  Chen et al. (arXiv 1604.06174)

The results are the same bits: dropout draws from a generator whose state is restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from halfbyte.nn import supervised_loss

LEVELS = ("none", "elementwise", "full")  # from the fastest to the smallest
_PROBE_TOKENS = 64

# What is worth keeping, by name: whatever costs more to compute again than to read back.
_PRODUCTS = (
    "halfbyte::matmul_4bit",
    "halfbyte::attention",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes a token that the forward leaves for the backward, by level.  Linear in the tokens of a micro-batch."""

    none: float
    elementwise: float
    full: float


def set_recomputation(model: nn.Module, level: str) -> None:
    """Make the model's layers keep or recompute as `level`, one of LEVELS, says.

    Raises:
        ValueError: the architecture has no layers that transformers can recompute.
    """
    if level == "none":
        model.activation_checkpointing_disable()  # type: ignore[operator]
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if level == "elementwise":
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    model.activation_checkpointing_enable(kwargs)  # type: ignore[operator]


def measure_activation_bytes(model: nn.Module) -> ActivationBytes:
    """By the forward of a short row: what autograd saves, and what the products put out."""
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=next(model.parameters()).device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(_PROBE_TOKENS, device=ids.device)[None],
        "labels": torch.full_like(ids, -100).index_fill_(1, torch.tensor([1], device=ids.device), 0),
    }
    set_recomputation(model, "none")
    products = _CountProducts()
    random_state = torch.get_rng_state()
    with _count_saved(model) as saved, products:
        supervised_loss(model, batch)
    torch.set_rng_state(random_state)  # the probe's dropout is not the run's
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    boundaries = config.num_hidden_layers * config.hidden_size * next(model.parameters()).element_size()
    one_layer = saved.bytes / config.num_hidden_layers  # while it is computed again
    return ActivationBytes(
        none=saved.bytes / _PROBE_TOKENS,
        elementwise=boundaries + (products.bytes + one_layer) / _PROBE_TOKENS,
        full=boundaries + one_layer / _PROBE_TOKENS,
    )


def choose_recomputation(activations: ActivationBytes, tokens: int, budget_bytes: float) -> str:
    """The fastest level whose activations for a micro-batch of `tokens` fit the budget; `full` if none does."""
    for level in LEVELS:
        if getattr(activations, level) * tokens <= budget_bytes:
            return level
    return "full"


def _keep_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    keep = operation.name().split(".")[0] in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class _CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that the products put out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        if operation.name().split(".")[0] in _PRODUCTS:
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
