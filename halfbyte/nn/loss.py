"""Cross-entropy at the supervised positions alone.

A row of 512 tokens with an answer of 40 needs 40 rows of logits, and over a vocabulary of 49,152 logits are
the largest tensor of a step. The hidden states that go into the output layer are cut down to the positions
that are supervised, whatever the model does with its logits afterwards (soft-capping, scaling).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a position that is not supervised


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

    def keep_supervised(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :-1][supervised][None], *args[1:])

    hook = output_layer.register_forward_pre_hook(keep_supervised) if output_layer is not None else None
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if logits.shape[:2] == batch["input_ids"].shape:  # a model that does not call its output layer as a module
        logits = logits[:, :-1][supervised]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets[supervised], reduction="sum")


def is_packed(position_ids: Tensor) -> bool:
    """Whether several texts share a row: their positions, (rows, length), do not count on by one."""
    return bool((position_ids.diff() != 1).any())


def count_supervised(batch: dict[str, Tensor]) -> int:
    """How many positions of a batch enter its loss."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
