"""One tokenized text with its labels, and what can be asked of it."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.data.templates import Tokenizer

IGNORE_INDEX = -100  # the label of a token that is not learned, as in torch's cross entropy


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized text.

    `input_ids` and `labels` are (length,) int32 and aligned: `labels[i]` is `input_ids[i]` where that token
    is learned and -100 elsewhere; the shift by one is the loss's. `labels[0]` is always -100, as nothing
    predicts the first token, so the labels that are not -100 are exactly the terms of the loss.

    `position_ids` are (length,) int32 where several texts were packed into one, counted from 0 in each.
    """

    input_ids: Tensor
    labels: Tensor
    source: str = ""
    position_ids: Tensor | None = None

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


class LazyExamples(Sequence[Example]):
    """Examples that are made when they are asked for, so that a million of them cost what their lengths do."""

    lengths: NDArray[np.int64]  # (examples,): tokens of each

    @abstractmethod
    def make(self, index: int) -> Example:
        """The example of this number, from 0."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, and no example {index}")
        return self.make(index % len(self))


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Tokens of each example, (examples,); no example is made for it."""
    if isinstance(examples, LazyExamples):
        return examples.lengths
    return np.fromiter((len(example.input_ids) for example in examples), np.int64, len(examples))


def fingerprint(examples: Sequence[Example]) -> str:
    """A SHA-256 of all ids and labels in their order: a resumed run compares it, so that changed data are
    noticed."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.to(torch.int32).numpy().tobytes())
        digest.update(example.labels.to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def preview(tokenizer: Tokenizer, example: Example) -> list[tuple[str, bool]]:
    """The example as text, in pieces that are learned (True) or not, with the control tokens visible.

    Joined, the pieces are the decoded example.
    """
    ids, learned = example.input_ids.tolist(), (example.labels != IGNORE_INDEX).tolist()
    ends = [i for i in range(1, len(ids) + 1) if i == len(ids) or learned[i] != learned[i - 1]]
    pieces, shown = [], ""
    for end in ends:
        # From the beginning each time: decoded alone, a piece may lose the space it begins with.
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append((text[len(shown) :], learned[end - 1]))
        shown = text
    return pieces
