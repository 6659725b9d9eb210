"""The data of a run: read, checked and encoded, for the run itself and for a person who looks at them before it."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from halfbyte.config import DataConfig, FinetuneConfig, PlanConfig
from halfbyte.data import Example, encode_rows, preview, read_rows
from halfbyte.data.checks import Inspection, find_control_tokens
from halfbyte.data.duplicates import RowIndex
from halfbyte.data.findings import KINDS
from halfbyte.data.masks import special_tokens
from halfbyte.errors import HalfbyteError
from halfbyte.huggingface import load_tokenizer
from halfbyte.report.histogram import percentile

ConfigWithData = FinetuneConfig | PlanConfig | DataConfig

# What the encoder counts and tells in sentences of its own (EncodingStatistics.warnings).
_TOLD_BY_THE_ENCODER = {"shortened", "shortened_answer", "split", "no_end", "shared_token", "control_token_in_text"}


@dataclass(frozen=True)
class ShownExample:
    """One of the first examples, as text."""

    source: str
    tokens: int
    supervised_tokens: int
    pieces: list[tuple[str, bool]]  # learned (True) or only read


@dataclass(frozen=True)
class DataReport:
    """The answer of `halfbyte data`."""

    config: DataConfig
    inspections: dict[str, Inspection]  # "training" and, where there are any, "held out"
    control_tokens: tuple[str, ...]
    first: list[ShownExample]

    @property
    def spoiled(self) -> bool:
        """Whether a run would not begin."""
        return any(not within_cap(self.config, inspection) for inspection in self.inspections.values())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "spoiled": self.spoiled,
            "sets": {name: _summary(inspection) for name, inspection in self.inspections.items()},
            "first": [
                {
                    "source": shown.source,
                    "tokens": shown.tokens,
                    "supervised_tokens": shown.supervised_tokens,
                    "pieces": [{"text": text, "learned": learned} for text, learned in shown.pieces],
                }
                for shown in self.first
            ],
        }


def examine_data(config: DataConfig, console: Console, shown: int = 3, findings_shown: int = 5) -> DataReport:
    """Look at all of the data that a run would have, as it would; what the command line calls.

    Raises:
        HalfbyteError: a file is not there or not readable at all, the model has no tokenizer.
    """
    tokenizer = load_tokenizer(config.model_name_or_path)
    inspections, first = {}, []
    for inspection, examples in inspect_data(config, tokenizer, None, findings_shown):
        for example in _with_progress(examples, inspection, console):
            if len(first) < shown and not inspections:
                pieces = preview(tokenizer, example)
                first.append(ShownExample(example.source, len(example.input_ids), example.supervised_tokens, pieces))
        inspection.close()
        inspections["held out" if inspections else "training"] = inspection
    return DataReport(config, inspections, special_tokens(tokenizer), first)


def read_data(
    config: FinetuneConfig | PlanConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[list[Example], list[Example]]:
    """The training and the held-out rows, checked, tokenized and masked; the second is empty where there are none.

    Raises:
        HalfbyteError: more rows than `skip_bad_rows` would spoil the run, or none is left.
    """
    sets: list[list[Example]] = []
    for inspection, examples in inspect_data(config, tokenizer, config.skip_bad_rows):
        sets.append(list(_with_progress(examples, inspection, console)))
        if not sets[-1]:
            raise HalfbyteError(f"{inspection.name}: no row is left, for all {inspection.findings.bad_rows} are bad")
        inspection.close()
        _tell(inspection, console)
    return sets[0], sets[1] if len(sets) > 1 else []


def inspect_data(
    config: ConfigWithData,
    tokenizer: PreTrainedTokenizerBase,
    skip_bad_rows: int | None,
    findings_kept: int = 5,
) -> Iterator[tuple[Inspection, Iterator[Example]]]:
    """The training set and then the held-out one, each with its examples, which are checked while they are taken."""
    control_tokens = find_control_tokens(special_tokens(tokenizer))
    training: RowIndex | None = None
    for path in (config.dataset, config.eval_dataset):
        if path is None:
            continue
        inspection = Inspection(path, control_tokens, tokenizer.bos_token_id, skip_bad_rows, training)
        inspection.findings.kept_of_a_kind = findings_kept
        rows = inspection.checked(read_rows(path, config.dataset_format, on_bad_row=inspection.refuse))
        yield inspection, inspection.encoded(rows, _encoder(config, tokenizer))
        training = inspection.index


def within_cap(config: ConfigWithData, inspection: Inspection) -> bool:
    """Whether a run goes on with what is left of this set."""
    return inspection.findings.bad_rows <= config.skip_bad_rows and inspection.statistics.examples > 0


def _encoder(config: ConfigWithData, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], Any]:
    return lambda row: encode_rows(tokenizer, [row], config.max_length, config.train_on_source)


def _with_progress(examples: Iterable[Example], inspection: Inspection, console: Console) -> Iterator[Example]:
    """The examples, while a line on a terminal tells how far the checks are."""
    if not console.is_terminal:
        yield from examples
        return
    with console.status(f"reading {inspection.name}") as status:
        last = time.monotonic()
        for example in examples:
            yield example
            if time.monotonic() - last > 0.2:
                last = time.monotonic()
                status.update(f"reading {inspection.name}: {inspection.statistics.rows:,} rows")


def _tell(inspection: Inspection, console: Console) -> None:
    """What a run says about a set before it begins."""
    statistics, findings = inspection.statistics, inspection.findings
    console.print(
        f"{inspection.name}: {statistics.rows:,} rows, {statistics.tokens:,} tokens,"
        f" {statistics.supervised_tokens:,} of them learned; the longest has {statistics.longest}",
        highlight=False,
    )
    notes = statistics.warnings()
    if findings.bad_rows:
        rows = "1 row is" if findings.bad_rows == 1 else f"{findings.bad_rows:,} rows are"
        notes.insert(0, f"{rows} left out, as skip_bad_rows allows; the first is {findings.first_that_spoils}")
    for name, kind in KINDS.items():
        if not kind.spoils and name in findings.counts and name not in _TOLD_BY_THE_ENCODER:
            notes.append(f"{kind.title}: {findings.counts[name]:,}; the first is {findings.kept[name][0].source}")
    for note in notes:
        console.print(f"  note: {note}", style="yellow", markup=False, highlight=False)


def _summary(inspection: Inspection) -> dict[str, Any]:
    statistics, lengths = inspection.statistics, inspection.lengths
    return {
        "name": inspection.name,
        "rows": statistics.rows,
        "bad_rows": inspection.findings.bad_rows,
        "examples": statistics.examples,
        "tokens": statistics.tokens,
        "supervised_tokens": statistics.supervised_tokens,
        "shortest": min(lengths, default=0),
        "median": percentile(lengths, 0.5),
        "nineteen_of_twenty": percentile(lengths, 0.95),
        "longest": statistics.longest,
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "findings": inspection.findings.to_dict(),
    }
