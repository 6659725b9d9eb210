"""What a merge did to a model: the merged files beside the adapter on its 4-bit base, which is what was trained.

For each predicted token, with p what was trained and q the merge, both given the same tokens before it,

    KL         Σ p·(log p − log q) over the vocabulary, in nats; its mean, and the worst token's
    agreement  the share of tokens at which both find the same token likeliest, as greedy decoding does

and the perplexity of each over the supervised tokens. Where there are no rows, text is made from the tokenizer's own
tokens, drawn at random: on it KL and agreement say what a merge changed, and perplexity says nothing.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from halfbyte.data import IGNORE_INDEX, Batch, Example, collate, encode_rows, lengths_of, read_rows

_MADE_ROWS, _MADE_LENGTH, _SEED = 16, 64, 42
_BATCH_TOKENS = 1024  # of rows that are run at once, padding included: their logits are in memory, and rows alone slow
_KEPT_BYTES = 1 << 30  # of logits
_POSITIONS = 256  # whose logits are compared at once, in float32


@dataclass(frozen=True)
class Figures:
    """One model against what was trained."""

    name: str
    bytes: int | None  # of its tensors on disk; None for the adapter on its base
    perplexity: float
    mean_kl: float  # nats a token
    worst_kl: float
    agreement: float  # 0 to 1


@dataclass(frozen=True)
class AuditResult:
    rows: int
    tokens: int  # that were compared
    made_text: bool  # there were no rows: perplexity says nothing
    figures: list[Figures]  # what was trained first
    shipped: str  # the name of what was written
    max_kl: float  # the threshold for the mean
    verdict: str

    @property
    def passed(self) -> bool:
        return self.of(self.shipped).mean_kl <= self.max_kl

    def of(self, name: str) -> Figures:
        return next(figures for figures in self.figures if figures.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def audit_examples(
    tokenizer: PreTrainedTokenizerBase,
    dataset: str | None,
    dataset_format: str,
    max_length: int,
    limit: int | None,
) -> tuple[list[Example], bool]:
    """The rows to compare on, and whether they were made for want of any.

    Raises:
        HalfbyteError: whatever the readers refuse.
    """
    if dataset is not None:
        rows = list(islice(read_rows(dataset, dataset_format), limit))
        examples, _ = encode_rows(tokenizer, rows, max_length)
        return examples, False
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([index for index in range(len(tokenizer)) if index not in special])
    generator = torch.Generator().manual_seed(_SEED)
    length = min(max_length, _MADE_LENGTH)
    examples = []
    for row in range(min(limit or _MADE_ROWS, _MADE_ROWS)):
        ids = ordinary[torch.randint(len(ordinary), (length,), generator=generator)].int()
        labels = ids.clone()
        labels[0] = IGNORE_INDEX
        examples.append(Example(ids, labels, f"made text, row {row + 1}"))
    return examples, True


def measure(
    name: str,
    load_trained: Callable[[], nn.Module],
    merges: Mapping[str, tuple[int, Callable[[], nn.Module]]],  # name -> bytes on disk, how to load it
    examples: Sequence[Example],
    pad_token_id: int | None = None,
) -> list[Figures]:
    """Compare each merge with what was trained, which has a name too; two models are in memory at a time."""
    trained = _Trained(load_trained().eval())
    found = [_figures(name, None, _compare(trained, None, _batches(examples, pad_token_id)))]
    for merge, (size, load) in merges.items():
        merged = load().eval()
        found.append(_figures(merge, size, _compare(trained, merged, _batches(examples, pad_token_id))))
        del merged
        gc.collect()  # a model holds itself in cycles, and the next one needs its memory
    return found


def _batches(examples: Sequence[Example], pad_token_id: int | None) -> Iterator[Batch]:
    """All examples, as many at once as there is room for, those of like length together."""
    lengths = lengths_of(examples)
    batch: list[int] = []
    for index in lengths.argsort(kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[index] > _BATCH_TOKENS:
            yield collate([examples[each] for each in batch], pad_token_id)
            batch = []
        batch.append(index)
    yield collate([examples[each] for each in batch], pad_token_id)


class _Trained:
    """What was trained, and what it said of the first batches, which the next merge is compared with as well."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[int, Tensor] = {}
        self._room = _KEPT_BYTES

    def logits(self, index: int, batch: Batch, supervised: Tensor) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        logits = _logits(self._model, batch, supervised)
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._kept[index] = logits
        return logits


@dataclass
class _Totals:
    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    worst_kl: float = 0.0
    agreeing: int = 0


@torch.no_grad()
def _compare(trained: _Trained, merged: nn.Module | None, batches: Iterator[Batch]) -> _Totals:
    """With itself, where there is no merge."""
    totals = _Totals()
    for index, batch in enumerate(batches):
        supervised = batch["labels"][:, 1:] != IGNORE_INDEX
        targets = batch["labels"][:, 1:][supervised]
        expected = trained.logits(index, batch, supervised)
        found = expected if merged is None else _logits(merged, batch, supervised)
        for begin in range(0, len(targets), _POSITIONS):
            part = slice(begin, begin + _POSITIONS)
            p, q = expected[part].float().log_softmax(-1), found[part].float().log_softmax(-1)
            kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).clamp(min=0)
            totals.tokens += len(kl)
            totals.loss += F.nll_loss(q, targets[part], reduction="sum").item()
            totals.kl += kl.sum().item()
            totals.worst_kl = max(totals.worst_kl, kl.max().item())
            totals.agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    return totals


def _logits(model: nn.Module, batch: Batch, supervised: Tensor) -> Tensor:
    """(supervised positions, vocabulary), as the model computes them."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[:, :-1][supervised]


def _figures(name: str, size: int | None, totals: _Totals) -> Figures:
    return Figures(
        name=name,
        bytes=size,
        perplexity=math.exp(min(totals.loss / totals.tokens, 700.0)),
        mean_kl=totals.kl / totals.tokens,
        worst_kl=totals.worst_kl,
        agreement=totals.agreeing / totals.tokens,
    )


def give_verdict(
    figures: Sequence[Figures], shipped: str, max_kl: float, made_text: bool, flags: Mapping[str, str] | None = None
) -> str:
    """One sentence: which of the merges to ship, and why; with its flags where it is not the one that was written."""
    trained, *merges = figures
    near = [each for each in merges if each.mean_kl <= max_kl]
    if not near:
        nearest = min(merges, key=lambda each: each.mean_kl)
        return (
            f"No merge is within a mean KL of {max_kl:g} of what was trained: ship the adapter with its base, or, if it"
            f" must be one model, {nearest.name}{_how(nearest, shipped, flags)}, which is nearest at"
            f" {nearest.mean_kl:.2g}."
        )
    smallest = min(near, key=lambda each: (each.bytes or 0, each.mean_kl))
    same_size = [each for each in near if each.bytes is not None and each.bytes <= 1.01 * (smallest.bytes or 0)]
    best = best_of(same_size, made_text)
    told = (
        "" if made_text else f", perplexity {best.perplexity:.3f} where what was trained has {trained.perplexity:.3f}"
    )
    return (
        f"Ship {best.name}{_how(best, shipped, flags)}: the smallest that stays within a mean KL of {max_kl:g} of what"
        f" was trained, at {best.mean_kl:.2g}{told}, and the same greedy token in {best.agreement:.2%} of places."
    )


def _how(best: Figures, shipped: str, flags: Mapping[str, str] | None) -> str:
    return "" if best.name == shipped or not flags else f" ({flags[best.name]})"


def best_of(figures: Sequence[Figures], made_text: bool) -> Figures:
    """The better of merges of a size: by perplexity on rows, and on made text by how near they are to the trained."""
    return min(figures, key=lambda each: each.mean_kl if made_text else each.perplexity)
