"""The checks of a data set, on its rows and on what they become, in bounded memory.

    inspection = Inspection(...)
    rows = inspection.checked(read_sources(sources, on_bad_row=inspection.refuse))
    for example in inspection.encoded(rows, encode):
        ...
    inspection.close()

Rows pass through one at a time; a row with a defect that spoils a run is left out and counted, and one too many of
them ends it. What takes all rows to see, the repetitions, is found at the end.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.data.duplicates import RowIndex, TrainedOn, signature_of
from halfbyte.data.encoding import EncodingStatistics
from halfbyte.data.examples import Example
from halfbyte.data.findings import Finding, Findings, finding_of
from halfbyte.data.rows import Row
from halfbyte.data.workers import work_in_chunks
from halfbyte.errors import HalfbyteError

# All of Unicode's category Cc but tab, line feed and carriage return.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LOST = re.compile("\ufffd")

FEW_ROWS = 4096  # looked at sooner than a process is ready

Encode = Callable[[Row], tuple[list[Example], EncodingStatistics]]


def check_row(row: Row, control_tokens: re.Pattern[str]) -> Iterator[Finding]:
    """What can be seen in the letters: some that are not meant, and turns out of order."""
    for where, text in _texts(row):
        typed = control_tokens.search(text)
        if typed:
            yield Finding("control_token_in_text", row.source, f"{where} holds {typed[0]}{_near(text, typed)}")
        control = _CONTROL.search(text)
        if control:
            yield Finding(
                "control_character", row.source, f"{where} holds U+{ord(control[0]):04X}{_near(text, control)}"
            )
        lost = _LOST.search(text)
        if lost:
            yield Finding("lost_character", row.source, f"{where} holds U+FFFD{_near(text, lost)}")
    yield from _check_turns(row)


def find_control_tokens(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of them, the longer first, and nothing where there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """Every text of a row, and what to call it."""
    for index, message in enumerate(row.messages):
        yield f"messages[{index}]", message["content"]
    if not row.messages:
        yield "the text", "".join(piece.text for piece in row.pieces or ())


def _near(text: str, match: re.Match[str]) -> str:
    before = text[max(0, match.start() - 20) : match.start()].strip()
    return f" after {before!r}" if before else ""


def _check_turns(row: Row) -> Iterator[Finding]:
    roles = [message["role"] for message in row.messages]
    for index, message in enumerate(row.messages):
        role, where = message["role"], f"messages[{index}]"
        if role == "system" and index > 0:
            yield Finding("mixed_roles", row.source, f"{where} is a system message in the midst")
        elif role in ("user", "assistant") and index > 0 and roles[index - 1] == role:
            yield Finding("mixed_roles", row.source, f"{where} is a second {role} turn in a row")
        if role == "user" and not message["content"].strip():
            yield Finding("empty_question", row.source, f"{where} is empty")
    if roles and roles[-1] != "assistant":
        yield Finding("unanswered", row.source, f"messages[{len(roles) - 1}] is the last, and the {roles[-1]}'s")


def check_examples(
    row: Row, examples: Iterable[Example], statistics: EncodingStatistics, bos_id: int | None
) -> Iterator[Finding]:
    """What can be seen of a row when it is tokens. `statistics` are of this row alone."""
    if bos_id is not None and any(example.input_ids[:2].tolist() == [bos_id, bos_id] for example in examples):
        yield Finding("doubled_bos", row.source, "begins with two BOS tokens, the template's and one in the text")
    if statistics.truncated_supervised_tokens:
        lost, kept = statistics.truncated_supervised_tokens, statistics.supervised_tokens
        detail = f"{lost:,} of its {lost + kept:,} learned tokens are cut; it has {statistics.longest:,} in all"
        yield Finding("shortened_answer", row.source, detail)
    elif statistics.truncated:
        yield Finding("shortened", row.source, f"has {statistics.longest:,} tokens")
    if statistics.dropped:
        yield Finding("dropped", row.source, f"has {statistics.longest:,} tokens")
    if statistics.windowed:
        yield Finding("windowed", row.source, f"{statistics.longest:,} tokens became {statistics.windows} examples")
    if statistics.without_bos:
        yield Finding("without_bos", row.source, "begins without a BOS")
    if statistics.answers_without_end:
        yield Finding("no_end", row.source, f"{statistics.answers_without_end} of its answers")
    if statistics.split_rows:
        yield Finding("split", row.source, f"{statistics.examples} examples")
    if statistics.answers_sharing_a_token:
        yield Finding("shared_token", row.source, f"{statistics.answers_sharing_a_token} of its answers")


class _Seen(NamedTuple):
    """What a row became, as it travels between processes."""

    source: str
    statistics: EncodingStatistics
    findings: list[Finding]
    examples: list[tuple[NDArray[np.int32], NDArray[np.int32]]]  # ids and labels of each
    refused: str | None  # why it cannot be encoded
    signature: bytes


def _look_closer(rows: Iterable[Row], encode: Encode, bos_id: int | None, near: bool) -> list[_Seen]:
    """Raises HalfbyteError for what is no row's fault: the tokenizer's, or a setting's."""
    seen = []
    for row in rows:
        signature = signature_of(row) if near else b""
        try:
            examples, statistics = encode(row)
        except HalfbyteError as error:
            if not str(error).startswith(row.source):
                raise
            seen.append(_Seen(row.source, EncodingStatistics(), [], [], str(error), signature))
            continue
        findings = list(check_examples(row, examples, statistics, bos_id))
        arrays = [(example.input_ids.numpy(), example.labels.numpy()) for example in examples]
        seen.append(_Seen(row.source, statistics, findings, arrays, None, signature))
    return seen


@dataclass
class Inspection:
    """One data set on its way from rows to examples: what was found, counted and measured."""

    name: str  # as it was asked for
    control_tokens: re.Pattern[str] = re.compile(r"(?!)")  # find_control_tokens
    bos_id: int | None = None
    skip_bad_rows: int | None = None  # how many may be left out; None: all, for nothing is to be trained
    training: RowIndex | None = None  # the rows that are learned, where this set is held out
    findings: Findings = field(default_factory=Findings)
    statistics: EncodingStatistics = field(default_factory=EncodingStatistics)
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of an example, before any cut -> examples
    index: RowIndex = field(default_factory=RowIndex)
    bad_sources: set[str] = field(default_factory=set)

    def refuse(self, error: HalfbyteError) -> None:
        """What `on_bad_row` of the readers is given.  HalfbyteError for one row too many."""
        self._enter([finding_of(error)])

    def checked(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows that can be trained on, as far as can be seen of a row."""
        trained_on = TrainedOn(self.training) if self.training is not None else None
        for row in self._until_broken(rows):
            found = list(check_row(row, self.control_tokens))
            leak = trained_on.find(row) if trained_on else None
            if leak:
                kind, where = leak
                what = "is" if kind == "held_out_in_training" else "has the question of"
                found.append(Finding(kind, row.source, f"{what} the training row {where}"))
            if self._enter(found):
                self.index.add_hashes(row)
                yield row

    def encoded(self, rows: Iterable[Row], encode: Encode, processes: int = 1) -> Iterator[Example]:
        """The examples of the rows that were `checked`, those that can be trained on as far as can be seen of their
        tokens; and what nearly equal rows are found by.  Few rows are not worth another process."""
        rows = iter(rows)
        first = list(islice(rows, FEW_ROWS + 1))
        work = partial(_look_closer, encode=encode, bos_id=self.bos_id, near=self.index.near)
        for seen in work_in_chunks(chain(first, rows), work, processes if len(first) > FEW_ROWS else 1):
            for row in seen:
                self.index.add_signature(row.signature)
                if row.refused is not None:
                    self.refuse(HalfbyteError(row.refused))
                elif self._enter(row.findings):
                    yield from self._count(row)

    def _count(self, row: "_Seen") -> Iterator[Example]:
        statistics = row.statistics
        self.statistics.add(statistics)
        whole = statistics.examples == 1  # of several, only the longest is known as it was before a cut
        self.lengths.update([statistics.longest] if whole else [len(ids) for ids, _ in row.examples])
        for ids, labels in row.examples:
            yield Example(torch.from_numpy(ids), torch.from_numpy(labels), row.source)

    def close(self) -> None:
        """Find what takes all rows to see."""
        words = {"duplicate": "is {} again", "other_answer": "asks what {} does", "near_duplicate": "is nearly {}"}
        for kind, source, earlier in self.index.repetitions():
            self.findings.add(Finding(kind, source, words[kind].format(earlier)))
        if self.training is not None:
            for source, trained in self.training.near_rows_of(self.index):
                self.findings.add(Finding("held_out_near_training", source, f"is nearly the training row {trained}"))

    def _until_broken(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows, and for somebody who only looks also those before a place that no reader gets past."""
        try:
            yield from rows
        except HalfbyteError as error:
            if self.skip_bad_rows is not None:
                raise
            finding = finding_of(error)
            if finding.has_place:
                self._enter([finding._replace(detail=f"{finding.detail}; nothing behind it was read")])
            elif not self.findings.bad_rows:  # or it is that no row is left, which is known
                raise

    def _enter(self, found: list[Finding]) -> bool:
        if self.findings.add_row(found):
            return True
        worst = next(finding for finding in found if finding.spoils)
        if self.skip_bad_rows is None:
            return False
        if self.findings.bad_rows > self.skip_bad_rows:
            allowed = f"; skip_bad_rows allows {self.skip_bad_rows} such rows" if self.skip_bad_rows else ""
            raise HalfbyteError(f"{worst}{allowed} (halfbyte data shows all there are)")
        self.bad_sources.add(worst.source)
        return False


def encode_checked(
    rows: Iterable[Row], encode: Encode, bos_id: int | None, skip_bad_rows: int
) -> tuple[list[Example], EncodingStatistics]:
    """The rows' examples without those that would spoil a run, which `refused` of the statistics tells of.

    For processes that do not know of each other: it raises HalfbyteError for more than `skip_bad_rows` of these rows.
    """
    examples: list[Example] = []
    total = EncodingStatistics()
    for row in rows:
        try:
            made, statistics = encode(row)
            for finding in check_examples(row, made, statistics, bos_id):
                if finding.spoils:
                    raise HalfbyteError(str(finding))
        except HalfbyteError as error:
            if len(total.refused) >= skip_bad_rows or not str(error).startswith(row.source):
                raise
            total.refused.append(str(error))
            continue
        total.add(statistics)
        examples += made
    return examples, total
