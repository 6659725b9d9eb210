"""Several examples in one row of tokens, so that no step spends arithmetic on padding.

Best fit, longest first: each example goes where it leaves the least room. Position ids restart with every
example, and that is what keeps them apart: attention is block-diagonal over the pieces, and the first label of an
example is never learned, so no token is predicted from another example's.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from halfbyte.data.examples import Example, LazyExamples, lengths_of
from halfbyte.errors import HalfbyteError


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the examples that share a row, none of more than `capacity` tokens.

    Deterministic: equal lengths keep their order, and the rows stand in the order of their first examples.
    Raises HalfbyteError for an example longer than a row.
    """
    if any(length > capacity for length in lengths):
        raise HalfbyteError(f"an example of {max(lengths)} tokens does not fit a packed row of {capacity}.")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers, by the tokens they have left
    occupied = 0  # bit r is set where with_room[r] is not empty: the tightest fit is the lowest bit that is enough
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[index]
        enough = occupied >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied &= ~(1 << room)
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        occupied |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


class PackedExamples(LazyExamples):
    """Rows of several examples each. A row is put together when it is asked for: packing copies no token."""

    def __init__(self, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> None:
        self._examples = examples
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        self._ends = np.cumsum(sizes)  # (rows,): row r is members[ends[r - 1] : ends[r]]
        self._members = np.fromiter(chain.from_iterable(rows), np.int32, int(sizes.sum()))
        lengths = lengths_of(examples)[self._members]
        self.lengths = np.add.reduceat(lengths, self._ends - sizes) if len(rows) else lengths

    def make(self, index: int) -> Example:
        begin = self._ends[index - 1] if index else 0
        examples = [self._examples[int(member)] for member in self._members[begin : self._ends[index]]]
        return Example(
            input_ids=torch.cat([example.input_ids for example in examples]),
            labels=torch.cat([example.labels for example in examples]),
            source=examples[0].source,
            position_ids=torch.cat([torch.arange(len(example.input_ids), dtype=torch.int32) for example in examples]),
        )


def pack(examples: Sequence[Example], max_length: int) -> PackedExamples:
    """The examples, packed into rows of at most `max_length` tokens, with position ids that restart in each."""
    return PackedExamples(examples, best_fit(lengths_of(examples).tolist(), max_length))
