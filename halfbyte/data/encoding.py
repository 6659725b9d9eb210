"""From rows to examples: token ids and labels, cut to length, with an account of what was done to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from halfbyte.data.examples import IGNORE_INDEX, Example
from halfbyte.data.masks import Rendering, render_row, special_tokens
from halfbyte.data.rows import Row
from halfbyte.data.templates import Tokenizer
from halfbyte.errors import HalfbyteError


@dataclass
class EncodingStatistics:
    """What became of the rows. Nothing that changes what is learned happens without a count here."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0  # tokens of the longest example, before any cut
    truncated: int = 0  # examples cut to max_length
    truncated_tokens: int = 0
    truncated_supervised_tokens: int = 0
    split_rows: int = 0  # rows whose template re-renders earlier turns: an example for each answer
    rows_with_special_text: int = 0  # a message holds the text of a control token, which becomes that token
    answers_without_end: int = 0  # answers that the template ends with no special token
    answers_sharing_a_token: int = 0  # answers whose first token begins in the prompt
    refused: list[str] = field(default_factory=list)  # what is wrong with rows that were left out, as sentences

    def add(self, other: "EncodingStatistics") -> None:
        """Count in what became of other rows."""
        for counted in fields(self):
            old, new = getattr(self, counted.name), getattr(other, counted.name)
            setattr(self, counted.name, max(old, new) if counted.name == "longest" else old + new)

    def warnings(self) -> list[str]:
        """A sentence for each thing that a person would want to know before training."""
        found = []
        if self.truncated:
            lost = self.truncated_supervised_tokens
            cost = f"{lost} of which were to be learned" if lost else "none of them to be learned"
            found.append(
                f"{self.truncated} of {self.examples} examples were cut to max_length: "
                f"{self.truncated_tokens} tokens, {cost}; the longest has {self.longest}"
            )
        if self.split_rows:
            found.append(
                f"{_count(self.split_rows, 'row')} made into an example for each answer, because the chat template "
                "renders earlier turns differently"
            )
        if self.rows_with_special_text:
            found.append(
                f"{_count(self.rows_with_special_text, 'row')} with the text of a control token in a message: "
                "the model will see that token"
            )
        if self.answers_without_end:
            found.append(
                f"{_count(self.answers_without_end, 'answer')} without a special token at the end: "
                "the model may not learn to stop"
            )
        if self.answers_sharing_a_token:
            found.append(
                f"{_count(self.answers_sharing_a_token, 'answer')} with a first token that begins in the prompt: "
                "training sees other tokens there than generation will"
            )
        return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Row], max_length: int, train_on_source: bool = False
) -> tuple[list[Example], EncodingStatistics]:
    """Tokenizes the rows in their order. Learned are the assistant's turns; with `train_on_source`, all of it.

    An example longer than `max_length` tokens loses first what follows its last learned token, then its
    earliest tokens after the BOS, so that the end of the answer survives. Raises HalfbyteError, with the
    row's source, where the template does not fit the row or nothing would be left to learn.
    """
    if max_length < 2:
        raise HalfbyteError(f"max_length is {max_length}: an example needs a token to read and a token to predict")
    if not rows:
        raise HalfbyteError("there are no rows to encode")
    specials = special_tokens(tokenizer)
    statistics = EncodingStatistics()
    examples = []
    for row in rows:
        renderings = render_row(tokenizer, row, specials, train_on_source)
        statistics.rows += 1
        statistics.split_rows += len(renderings) > 1
        statistics.rows_with_special_text += any(
            special in message["content"] for message in row.messages for special in specials
        )
        for rendering in renderings:
            statistics.answers_without_end += rendering.answers_without_end
            ids, learned = _tokenize(tokenizer, rendering, statistics)
            examples.append(_fit(ids, learned, max_length, tokenizer.bos_token_id, row.source, statistics))
    return examples, statistics


def _tokenize(
    tokenizer: Tokenizer, rendering: Rendering, statistics: EncodingStatistics
) -> tuple[list[int], list[bool]]:
    """Ids of the text and whether each is learned: a token is when any of its characters is to be."""
    try:
        # Never add_special_tokens: a template has written its BOS already, and must not get a second one.
        encoded = tokenizer(
            rendering.text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            padding=False,
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    except (NotImplementedError, KeyError):
        raise HalfbyteError(
            "this tokenizer does not tell where its tokens lie in the text, which the loss mask needs: "
            "use one with a tokenizer.json"
        ) from None
    learned = [False] * len(ids)
    for start, end in rendering.spans:
        shared = False
        for position, (first, last) in enumerate(offsets):
            # Some byte-level tokenizers trim white space from the offsets, so that a token of one space is
            # (k, k) with k its end: then the character before k is the token's.
            if last > start and min(first, last - 1) < end:
                learned[position] = True
                shared |= first < start
        statistics.answers_sharing_a_token += shared
    if rendering.bos_id is not None:
        ids, learned = [rendering.bos_id, *ids], [False, *learned]
    if rendering.eos_id is not None:
        ids, learned = [*ids, rendering.eos_id], [*learned, True]
    return ids, learned


def _fit(
    ids: list[int],
    learned: list[bool],
    max_length: int,
    bos_id: int | None,
    source: str,
    statistics: EncodingStatistics,
) -> Example:
    length, supervised = len(ids), sum(learned[1:])
    if length > max_length and supervised:
        last = length - learned[::-1].index(True)
        stop = max(last, max_length)
        kept = slice(stop - max_length, stop)
        if bos_id is not None and ids[0] == bos_id:  # attention leans on the BOS: never cut that
            ids, learned = [ids[0], *ids[kept][1:]], [False, *learned[kept][1:]]
        else:
            ids, learned = ids[kept], learned[kept]
        statistics.truncated += 1
        statistics.truncated_tokens += length - len(ids)
        statistics.truncated_supervised_tokens += supervised - sum(learned[1:])
    if not any(learned[1:]):
        raise HalfbyteError(f"{source}: no token of this row would be learned: the mask is empty")
    statistics.examples += 1
    statistics.tokens += len(ids)
    statistics.supervised_tokens += sum(learned[1:])
    statistics.longest = max(statistics.longest, length)
    input_ids = torch.tensor(ids, dtype=torch.int32)
    mask = torch.tensor(learned)
    mask[0] = False
    return Example(input_ids, torch.where(mask, input_ids, IGNORE_INDEX), source)
