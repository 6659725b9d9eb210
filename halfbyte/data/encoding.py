"""From rows to examples: token ids and labels, cut to length, with an account of what was done to them."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

import torch

from halfbyte.data.examples import IGNORE_INDEX, Example
from halfbyte.data.masks import Rendering, is_chat, render_pieces, render_row, special_tokens
from halfbyte.data.rows import Row
from halfbyte.data.templates import Conversation, Tokenizer, begins_with_bos
from halfbyte.data.truncation import TRUNCATIONS, Labelled
from halfbyte.errors import HalfbyteError


@dataclass
class EncodingStatistics:
    """What became of the rows. Nothing that changes what is learned happens without a count here."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0  # tokens of the longest example, before any cut
    truncated: int = 0  # examples that lost something to max_length and are one still
    truncated_tokens: int = 0
    truncated_supervised_tokens: int = 0
    dropped: int = 0  # examples left out for their length (drop)
    dropped_tokens: int = 0
    windowed: int = 0  # examples cut into several (split)
    windows: int = 0  # what they were cut into
    split_rows: int = 0  # rows whose template re-renders earlier turns: an example for each answer
    rows_of_text: int = 0  # rows laid out by their author, which no chat template writes
    rows_in_alpaca_prompt: int = 0  # Alpaca rows of a tokenizer without a template
    rows_with_special_text: int = 0  # a message holds the text of a control token, which becomes that token
    answers_without_end: int = 0  # answers that the template ends with no special token
    answers_sharing_a_token: int = 0  # answers whose first token begins in the prompt
    without_bos: int = 0  # texts whose template writes no BOS where the tokenizer would put one
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
        if self.dropped:
            found.append(
                f"{_count(self.dropped, 'example')} of more than max_length tokens left out, "
                f"{self.dropped_tokens} tokens; the longest has {self.longest}"
            )
        if self.windowed:
            found.append(
                f"{_count(self.windowed, 'example')} of more than max_length tokens cut into {self.windows}; "
                f"the longest has {self.longest}"
            )
        sentences = {
            "made into an example for each answer, because the chat template renders earlier turns differently": (
                self.split_rows,
                "row",
            ),
            "with the text of a control token in a message: the model will see that token": (
                self.rows_with_special_text,
                "row",
            ),
            "without a special token at the end: the model may not learn to stop": (self.answers_without_end, "answer"),
            "with a first token that begins in the prompt: training sees other tokens there than generation will": (
                self.answers_sharing_a_token,
                "answer",
            ),
            "without a BOS, which this tokenizer puts before every text: its chat template should write one": (
                self.without_bos,
                "example",
            ),
        }
        return found + [f"{_count(number, noun)} {what}" for what, (number, noun) in sentences.items() if number]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def encode_rows(
    tokenizer: Tokenizer,
    rows: Iterable[Row],
    max_length: int,
    train_on_source: bool = False,
    train_on_last_turn: bool = False,
    truncation: str = "keep_end",
) -> tuple[list[Example], EncodingStatistics]:
    """Tokenizes the rows in their order. Learned are the assistant's turns, all of them or with
    `train_on_last_turn` the last; with `train_on_source`, everything.

    What becomes of an example longer than `max_length` tokens, `truncation` says: keep_end, drop, split
    (halfbyte.data.truncation) or error. Raises HalfbyteError, with the row's source, where the template does not
    fit the row, nothing would be left to learn, or an example is too long for `error`. No example is left where
    `drop` drops them all.
    """
    statistics = EncodingStatistics()
    encoder = Encoder(tokenizer, max_length, train_on_source, train_on_last_turn, truncation)
    examples = [example for row in rows for example in encoder.encode(row, statistics)]
    if not statistics.rows:
        raise HalfbyteError("there are no rows to encode")
    return examples, statistics


class Encoder:
    """Encodes one row at a time; the arguments are those of `encode_rows`, the counts the caller's."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        train_on_source: bool = False,
        train_on_last_turn: bool = False,
        truncation: str = "keep_end",
    ) -> None:
        if max_length < 2:
            raise HalfbyteError(f"max_length is {max_length}: an example needs a token to read and a token to predict")
        if truncation != "error" and truncation not in TRUNCATIONS:
            raise HalfbyteError(f"truncation '{truncation}' is not known: use {', '.join(TRUNCATIONS)} or error")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.train_on_source = train_on_source
        self.train_on_last_turn = train_on_last_turn
        self.truncation = truncation
        self.specials = special_tokens(tokenizer)
        self.bos_is_expected = begins_with_bos(tokenizer)
        self._special = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")

    def encode(self, row: Row, statistics: EncodingStatistics) -> Iterator[Example]:
        """The row's examples: mostly one; none where it is dropped. Counted as they are taken."""
        renderings = render_row(self.tokenizer, row, self.specials, self.train_on_source, self.train_on_last_turn)
        chat = is_chat(self.tokenizer, row)
        statistics.rows += 1
        statistics.split_rows += len(renderings) > 1
        statistics.rows_of_text += not chat
        statistics.rows_in_alpaca_prompt += chat and not self.tokenizer.chat_template
        statistics.rows_with_special_text += chat and any(
            self._special.search(message.get("content") or "") for message in row.messages
        )
        for rendering in renderings:
            statistics.answers_without_end += rendering.answers_without_end
            whole, sharing = tokenize(self.tokenizer, rendering)
            statistics.answers_sharing_a_token += sharing
            statistics.without_bos += self.bos_is_expected and whole.ids[:1] != [self.tokenizer.bos_token_id]
            if not whole.supervised:
                raise HalfbyteError(f"{row.source}: no token of this row would be learned: the mask is empty")
            for labelled in self._fit(whole, row.source, statistics):
                statistics.examples += 1
                statistics.tokens += len(labelled.ids)
                statistics.supervised_tokens += labelled.supervised
                yield _example(labelled, row.source)

    def _fit(self, whole: Labelled, source: str, statistics: EncodingStatistics) -> list[Labelled]:
        length = len(whole.ids)
        statistics.longest = max(statistics.longest, length)
        if length <= self.max_length:
            return [whole]
        if self.truncation == "error":
            raise HalfbyteError(
                f"{source}: this row has {length} tokens and max_length is {self.max_length}: raise it, or choose what "
                f"is to become of longer rows (truncation: {', '.join(TRUNCATIONS)})"
            )
        fitting = TRUNCATIONS[self.truncation](whole, self.max_length, self.tokenizer.bos_token_id)
        if not fitting:
            statistics.dropped += 1
            statistics.dropped_tokens += length
        elif len(fitting) > 1:
            statistics.windowed += 1
            statistics.windows += len(fitting)
        else:
            statistics.truncated += 1
            statistics.truncated_tokens += length - len(fitting[0].ids)
            statistics.truncated_supervised_tokens += whole.supervised - fitting[0].supervised
        return fitting


def _example(labelled: Labelled, source: str) -> Example:
    input_ids = torch.tensor(labelled.ids, dtype=torch.int32)
    mask = torch.tensor(labelled.learned)
    mask[0] = False
    return Example(input_ids, torch.where(mask, input_ids, IGNORE_INDEX), source)


def tokenize(tokenizer: Tokenizer, rendering: Rendering) -> tuple[Labelled, int]:
    """Ids of the text and whether each is learned: a token is when any of its characters is to be.

    Also how many of the learned spans begin within a token. Raises HalfbyteError for a tokenizer that does not tell
    where its tokens lie.
    """
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
    starts, ends = [start for start, _ in rendering.spans], [end for _, end in rendering.spans]
    sharing = set()
    for position, (first, last) in enumerate(offsets):
        # Some byte-level tokenizers trim white space from the offsets, so that a token of one space is
        # (k, k) with k its end: then the character before k is the token's.
        span = bisect_right(ends, min(first, last - 1))  # the first one that ends behind the token's beginning
        if span < len(ends) and last > starts[span]:
            learned[position] = True
            if first < starts[span]:
                sharing.add(span)
    if rendering.bos_id is not None:
        ids, learned = [rendering.bos_id, *ids], [False, *learned]
    if rendering.eos_id is not None:
        ids, learned = [*ids, rendering.eos_id], [*learned, True]
    return Labelled(ids, learned), len(sharing)


def encode_prompt(tokenizer: Tokenizer, row: Row) -> tuple[list[int], str]:
    """The ids of what comes before the row's last answer, exactly as in training, and that answer.

    Raises HalfbyteError where the row has no prompt: a text that is learned from its beginning on.
    """
    if is_chat(tokenizer, row):
        conversation = Conversation(tokenizer, row)
        last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
        prompt = Rendering(conversation.render(last, add_generation_prompt=True), [])
        return tokenize(tokenizer, prompt)[0].ids, row.messages[last]["content"]
    whole = render_pieces(tokenizer, row)
    if not whole.spans or not whole.spans[-1][0]:
        raise HalfbyteError(f"{row.source}: this text has no prompt to answer: measure the loss alone (generate false)")
    start, end = whole.spans[-1]
    prompt = Rendering(whole.text[:start], [], bos_id=whole.bos_id)
    return tokenize(tokenizer, prompt)[0].ids, whole.text[start:end]
