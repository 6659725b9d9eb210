"""One optimizer step, and the loss on held-out rows."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from halfbyte.data import Batch, Example, collate, lengths_of
from halfbyte.errors import HalfbyteError
from halfbyte.nn import count_supervised, supervised_loss


class PassOutOfMemoryError(RuntimeError):
    """A forward or backward pass found no memory; no gradient is left of the step, and nothing was updated."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    learning_rate: float,
    max_grad_norm: float,
    device: torch.device,
    kept: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float | int]:
    """Forward, backward, clip and update.  Returns `loss`, `grad_norm` and the tokens that were counted.

    The loss is the mean over the supervised tokens of the whole step, so it and its gradient are the same
    however the rows are split into micro-batches. Each forward pass is run within `kept()`, which says where what it
    keeps for the backward lies.

    Raises:
        HalfbyteError: the gradient is not finite; nothing was updated.
        PassOutOfMemoryError: no more memory; torch's random state is what it was, and the step can be taken again.
    """
    model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    supervised = sum(count_supervised(batch) for batch in micro_batches)
    random_state = _random_state(device)
    try:
        total = _accumulate_gradients(model, micro_batches, supervised, device, kept)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold the tensors of the pass
        said = str(error)
        total = None
    if total is None:
        optimizer.zero_grad(set_to_none=True)
        _set_random_state(device, random_state)
        raise PassOutOfMemoryError(said)
    # A limit of 0 means no clipping, as in transformers; the norm is wanted all the same.
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    if not torch.isfinite(grad_norm):
        raise HalfbyteError("the gradient is not finite; lower learning_rate or max_grad_norm and run again.")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": total.item() / supervised,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm.item(),
        "supervised_tokens": supervised,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in micro_batches),
    }


def _accumulate_gradients(
    model: nn.Module,
    micro_batches: list[Batch],
    supervised: int,
    device: torch.device,
    kept: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """The sum of the losses, (), float32; gradients are of its mean."""
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        with kept():
            loss = supervised_loss(model, {key: value.to(device) for key, value in batch.items()})
        (loss / supervised).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's allocator for the CPU has no class of error of its own.
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> tuple[float, int]:
    """The mean loss over the supervised tokens of all batches, and how many those are."""
    model.eval()
    total, supervised = 0.0, 0
    for batch in batches:
        total += supervised_loss(model, {key: value.to(device) for key, value in batch.items()}).item()
        supervised += count_supervised(batch)
    return total / supervised, supervised


def evaluation_batches(examples: Sequence[Example], size: int, pad_token_id: int | None) -> Iterator[Batch]:
    """All examples, those of like length together, so that little is padded."""
    order = lengths_of(examples).argsort(kind="stable").tolist()
    return (
        collate([examples[index] for index in order[start : start + size]], pad_token_id)
        for start in range(0, len(order), size)
    )
