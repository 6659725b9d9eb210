"""What can be wrong with data: a table of kinds, and a book of what was found.

A kind either spoils a run, which is then not begun (or the row is left out, where `skip_bad_rows` allows it), or is
worth knowing. The table is in the order in which a person reads it: the worst first.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from halfbyte.errors import HalfbyteError


class Kind(NamedTuple):
    """A sort of defect."""

    title: str  # how a list is headed
    spoils: bool
    meaning: str  # what it would do to a model, and the way out


KINDS = {
    # What would spoil a run
    "unreadable": Kind(
        "lines that cannot be read", True, "the row is broken off, garbled or no JSON: mend it, or write the file anew"
    ),
    "wrong_row": Kind(
        "rows that are not of the format", True, "a key is missing, or is something else than its format says"
    ),
    "wrong_roles": Kind(
        "roles that are not known or out of order", True, "who says what decides what is learned: it is not guessed"
    ),
    "empty_answer": Kind(
        "empty answers", True, "the model would learn to say nothing: fill the answer in, or remove the row"
    ),
    "template_refuses": Kind(
        "rows that the chat template refuses", True, "what the model would see, or what to learn of it, cannot be told"
    ),
    "nothing_learned": Kind(
        "rows with nothing to learn", True, "no token of the row is supervised, so all that it costs is time"
    ),
    "doubled_bos": Kind(
        "a doubled BOS", True, "the model never sees two of them when it answers: take the one in the text away"
    ),
    "held_out_in_training": Kind(
        "held-out rows that are trained on", True, "the loss on them measures memory: remove them from one of the two"
    ),
    # What is worth knowing
    "held_out_prompt_in_training": Kind(
        "held-out questions that are trained on, with another answer", False, "the model has seen the question"
    ),
    "held_out_near_training": Kind(
        "held-out rows that are nearly trained on", False, "the loss on them tells less than it seems to"
    ),
    "duplicate": Kind("rows that are there before", False, "a row that occurs twice is learned twice"),
    "near_duplicate": Kind(
        "rows that are there before, nearly", False, "most of the text is another row's, letter for letter"
    ),
    "other_answer": Kind(
        "questions that are there before, with another answer", False, "the model learns a bit of either"
    ),
    "shortened_answer": Kind(
        "rows cut, and their answers with them", False, "answers begin in their midst: raise max_length"
    ),
    "shortened": Kind("rows cut to max_length", False, "prompts lose their beginning; the answers are whole"),
    "dropped": Kind("rows longer than max_length", False, "truncation is drop: nothing of them is learned"),
    "windowed": Kind("rows cut into several examples", False, "truncation is split: each sees only its own part"),
    "without_bos": Kind(
        "texts without a BOS", False, "the tokenizer would put one before every text; its chat template writes none"
    ),
    "no_end": Kind(
        "answers without an end token", False, "the model may not learn to stop: another chat template may write one"
    ),
    "control_token_in_text": Kind(
        "control tokens that somebody typed", False, "the model will see the token, and not its letters"
    ),
    "control_character": Kind(
        "control characters", False, "they are seldom meant: remains of a terminal, a PDF, a broken export"
    ),
    "lost_character": Kind(
        "characters lost in a conversion", False, "U+FFFD stands where something was not decoded, and would be learned"
    ),
    "mixed_roles": Kind(
        "turns out of order", False, "two of one role after another, or a system message in the midst: is one missing?"
    ),
    "unanswered": Kind("conversations that end with a question", False, "what follows the last answer teaches nothing"),
    "empty_question": Kind("empty questions", False, "the answer belongs to nothing that the model can see"),
    "split": Kind(
        "rows made into an example for each answer", False, "the chat template renders earlier turns differently"
    ),
    "shared_token": Kind(
        "answers whose first token begins in the prompt", False, "training sees other tokens there than generation will"
    ),
}  # fmt: skip


class Finding(NamedTuple):
    """One defect, where it is."""

    kind: str  # a key of KINDS
    source: str  # "file:line"
    detail: str  # what is wrong there; no sentence, no full stop

    @property
    def spoils(self) -> bool:
        return KINDS[self.kind].spoils

    @property
    def has_place(self) -> bool:
        """Whether it is known where in the file it is."""
        return re.search(f"(?:{_PLACE})$", self.source) is not None

    def __str__(self) -> str:
        return f"{self.source}: {self.detail}"


# The readers and the encoder say what is wrong in a sentence, and its words tell the kind; what none of them matches
# is a row that is not of its format.
_WORDS = {
    "template_refuses": r"chat template",
    "unreadable": r"JSON|UTF-8|cut off|more text|text after the end|occurs twice|surrogate",
    "nothing_learned": r"mask is empty|nothing to learn",
    "empty_answer": r" is empty",
    "wrong_roles": r"the role|first message",
}
_PLACE = r":\d+(?: \(row \d+\))?| \(row \d+\)"  # what a source ends with
_SOURCE = re.compile(rf"^(?P<source>.+?(?:{_PLACE})): (?P<detail>.*)$", re.DOTALL)


def finding_of(error: HalfbyteError) -> Finding:
    """What a reader or the encoder said about a row, as a finding."""
    sentence = str(error).removesuffix(".")
    parts = _SOURCE.match(sentence)
    source, detail = (parts["source"], parts["detail"]) if parts else ("", sentence)
    kind = next((kind for kind, words in _WORDS.items() if re.search(words, detail)), "wrong_row")
    return Finding(kind, source, detail)


@dataclass
class Findings:
    """A book of findings that stays small: all are counted, and of each kind the first few are kept."""

    kept_of_a_kind: int = 5
    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[Finding]] = field(default_factory=dict)
    bad_rows: int = 0  # rows with a finding that spoils, each counted once

    def add(self, finding: Finding) -> None:
        self.counts[finding.kind] = self.counts.get(finding.kind, 0) + 1
        kept = self.kept.setdefault(finding.kind, [])
        if len(kept) < self.kept_of_a_kind:
            kept.append(finding)

    def add_row(self, findings: list[Finding]) -> bool:
        """Enter what was found in one row, each kind once; whether the row can be trained on."""
        for finding in {found.kind: found for found in reversed(findings)}.values():
            self.add(finding)
        bad = any(finding.spoils for finding in findings)
        self.bad_rows += bad
        return not bad

    @property
    def first_that_spoils(self) -> Finding | None:
        return next((found[0] for kind, found in self.kept.items() if KINDS[kind].spoils and found), None)

    def to_dict(self) -> dict[str, Any]:
        """kind -> how often, whether it spoils a run, and the first places; the worst kinds first."""
        return {
            name: {
                "count": self.counts[name],
                "spoils": kind.spoils,
                "title": kind.title,
                "meaning": kind.meaning,
                "first": [{"source": found.source, "detail": found.detail} for found in self.kept[name]],
            }
            for name, kind in KINDS.items()
            if name in self.counts
        }
