"""From examples to optimizer steps of padded micro-batches, in an order that a seed alone decides.

The order is a pure function of (number of examples, seed, epoch), so a resumed run needs two integers, the
epoch and the steps done in it, to go on with exactly the examples that an uninterrupted run would have seen.

Padding is wasted work, so examples of like length are put together, but only within a window of a few steps:
the shuffled order is cut into windows, each window is sorted by length and cut into micro-batches, and the
micro-batches are shuffled again. Every example still occurs once an epoch, in a place that depends on the
seed.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halfbyte.data.examples import IGNORE_INDEX, Example, lengths_of
from halfbyte.errors import HalfbyteError

Batch = dict[str, Tensor]


def epoch_order(number_of_rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(number_of_rows), the same on every machine; global generators play no part."""
    rng = _generator(seed, epoch, "rows")
    # Python keeps the sequence of random() between versions; its shuffle() and torch's randperm do not say so.
    keys = [rng.random() for _ in range(number_of_rows)]
    return sorted(range(number_of_rows), key=keys.__getitem__)


def _generator(seed: int, epoch: int, purpose: str) -> random.Random:
    # A text is hashed with SHA-512, so that (0, 1) and (1, 0) have nothing in common, as sums of them would.
    return random.Random(f"halfbyte {purpose} seed={seed} epoch={epoch}")


def plan_steps(
    lengths: Sequence[int],  # tokens of each example
    seed: int,
    epoch: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    length_window_steps: int = 16,  # sort by length within so many steps; 0: leave the shuffled order alone
) -> list[list[list[int]]]:
    """The epoch as steps of micro-batches of example numbers. Every example occurs once.

    All micro-batches are full but the epoch's last one, and all steps but the last: of n examples there are
    ceil(n / batch size) micro-batches and ceil(that / accumulation) steps.
    """
    size, accumulation = per_device_train_batch_size, gradient_accumulation_steps
    if size < 1 or accumulation < 1:
        raise HalfbyteError(
            f"per_device_train_batch_size ({size}) and gradient_accumulation_steps ({accumulation}) must be at least 1"
        )
    if not lengths:
        raise HalfbyteError("there are no examples to train on")
    order = epoch_order(len(lengths), seed, epoch)
    full = len(order) - len(order) % size  # the rest, fewer than a micro-batch, is the epoch's last
    window = max(1, length_window_steps * accumulation) * size
    rng = _generator(seed, epoch, "windows")
    micro_batches = []
    for first in range(0, full, window):
        members = order[first : min(first + window, full)]
        if length_window_steps:
            members.sort(key=lambda index: lengths[index])  # stable, so equal lengths keep their shuffled order
        grouped = [members[i : i + size] for i in range(0, len(members), size)]
        keys = [rng.random() for _ in grouped]
        micro_batches += [grouped[i] for i in sorted(range(len(grouped)), key=keys.__getitem__)]
    if full < len(order):
        micro_batches.append(order[full:])
    return [micro_batches[i : i + accumulation] for i in range(0, len(micro_batches), accumulation)]


def padded_share(lengths: Sequence[int], steps: Sequence[Sequence[Sequence[int]]]) -> float:
    """The share of padding among all token positions of these steps, 0 to 1."""
    batches = [[lengths[index] for index in batch] for step in steps for batch in step]
    positions = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(map(sum, batches)) / positions if positions else 0.0


def collate(examples: Sequence[Example], pad_token_id: int | None) -> Batch:
    """Pads on the right to the longest: four (rows, length) int64 tensors.

    `labels` are aligned with `input_ids` (the loss shifts), -100 where nothing is learned. Padding is told by
    `attention_mask` 0 and label -100, never by its id, so a tokenizer whose pad token is its EOS unlearns
    nothing.
    """
    rows, length = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full((rows, length), pad_token_id if pad_token_id is not None else 0)
    labels = torch.full((rows, length), IGNORE_INDEX)
    attention_mask = torch.zeros((rows, length), dtype=torch.int64)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        input_ids[row, :end] = example.input_ids
        labels[row, :end] = example.labels
        attention_mask[row, :end] = 1
    # Counted on through the padding: a restart at 0 would read as a second packed row.
    position_ids = torch.arange(length).expand(rows, length).contiguous()
    for row, example in enumerate(examples):
        if example.position_ids is not None:
            end = len(example.input_ids)
            position_ids[row, :end] = example.position_ids
            position_ids[row, end:] -= end  # here it is one: padding sees padding alone
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
    }


def training_steps(
    examples: Sequence[Example],
    *,
    seed: int,
    epoch: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    pad_token_id: int | None,
    start_step: int = 0,
    length_window_steps: int = 16,
) -> Iterator[list[Batch]]:
    """One epoch, an optimizer step at a time, each a list of at most `gradient_accumulation_steps`
    micro-batches.

    `start_step` is the number of steps of this epoch that are done: with it the iteration goes on as if it
    had never stopped. Raises HalfbyteError when the epoch has fewer steps than that.
    """
    steps = plan_steps(
        lengths_of(examples).tolist(),
        seed,
        epoch,
        per_device_train_batch_size,
        gradient_accumulation_steps,
        length_window_steps,
    )
    if not 0 <= start_step <= len(steps):
        raise HalfbyteError(
            f"cannot go on from step {start_step}: an epoch of these data has {len(steps)} steps, "
            "so the data set or the batch size is not the one the checkpoint was made with"
        )
    # Not a generator itself, so that the errors above come at the call.
    return (
        [collate([examples[index] for index in batch], pad_token_id) for batch in step] for step in steps[start_step:]
    )
