"""What becomes of an example that is longer than max_length tokens. Nothing of it is lost without a count.

    keep_end  what follows the last learned token is cut, then the beginning: the end of the answer survives
    drop      the example is left out
    split     it is cut into windows of about one length; each begins with a token that was read before, so that
              every learned token is learned once
    error     the run stops

A BOS stays where it was in every case: attention leans on it.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from halfbyte.errors import HalfbyteError


class Labelled(NamedTuple):
    """Token ids, and whether each is learned; the first of them never is, since nothing predicts it."""

    ids: list[int]
    learned: list[bool]

    @property
    def supervised(self) -> int:
        return sum(self.learned[1:])


def keep_end(whole: Labelled, max_length: int, bos_id: int | None) -> list[Labelled]:
    """One example of `max_length` tokens that ends where the last learned token does, or later."""
    stop = max(_end(whole), max_length)
    start = stop - max_length
    if _begins_with(whole, bos_id):
        return [Labelled([whole.ids[0], *whole.ids[start + 1 : stop]], [False, *whole.learned[start + 1 : stop]])]
    return [Labelled(whole.ids[start:stop], whole.learned[start:stop])]


def drop(whole: Labelled, max_length: int, bos_id: int | None) -> list[Labelled]:  # noqa: ARG001
    """No example."""
    return []


def split(whole: Labelled, max_length: int, bos_id: int | None) -> list[Labelled]:
    """As few windows as there can be, as long as each other; those with nothing to learn are left out."""
    end = max(_end(whole), min(max_length, len(whole.ids)))
    if end <= max_length:
        return [Labelled(whole.ids[:end], whole.learned[:end])]
    bos = [whole.ids[0]] if _begins_with(whole, bos_id) else []
    room = max_length - 1 - len(bos)  # tokens that a later window adds
    if room < 1:
        raise HalfbyteError(f"max_length is {max_length}: a window that begins with a BOS needs at least 3 tokens")
    number = -(-(end - 1) // room)
    edges = [1 + (end - 1) * i // number for i in range(number + 1)]
    windows = []
    for start, stop in pairwise(edges):
        head = bos if start > 1 else []
        ids = [*head, *whole.ids[start - 1 : stop]]
        windows.append(Labelled(ids, [False] * (len(head) + 1) + whole.learned[start:stop]))
    return [window for window in windows if window.supervised]


TRUNCATIONS: dict[str, Callable[[Labelled, int, int | None], list[Labelled]]] = {
    "keep_end": keep_end,
    "drop": drop,
    "split": split,
}


def _end(whole: Labelled) -> int:
    """Behind the last learned token."""
    return len(whole.ids) - whole.learned[::-1].index(True)


def _begins_with(whole: Labelled, bos_id: int | None) -> bool:
    return bos_id is not None and whole.ids[0] == bos_id
