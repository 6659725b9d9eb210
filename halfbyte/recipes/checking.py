"""The checks that a run begins with: every row is looked at before a model is, and before any is tokenized."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from halfbyte.config import DataConfig, FinetuneConfig, PlanConfig
from halfbyte.data import Encoder, EncodingStatistics, Example, Row, Source, read_sources
from halfbyte.data.checks import Inspection, find_control_tokens
from halfbyte.data.duplicates import RowIndex
from halfbyte.data.findings import KINDS
from halfbyte.data.masks import special_tokens
from halfbyte.errors import HalfbyteError
from halfbyte.recipes.data_sources import describe_sources

ConfigWithData = FinetuneConfig | PlanConfig | DataConfig

# What the encoder counts and tells in sentences of its own (EncodingStatistics.warnings).
_TOLD_BY_THE_ENCODER = {
    "shortened",
    "shortened_answer",
    "split",
    "no_end",
    "shared_token",
    "control_token_in_text",
    "dropped",
    "windowed",
    "without_bos",
}

_T = TypeVar("_T")


def row_encoder(
    config: ConfigWithData, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Row], tuple[list[Example], EncodingStatistics]]:
    """What makes examples of one row, as the configuration says."""
    encoder = Encoder(
        tokenizer, config.max_length, config.train_on_source, config.train_on_last_turn, config.truncation
    )

    def encode(row: Row) -> tuple[list[Example], EncodingStatistics]:
        statistics = EncodingStatistics()
        return list(encoder.encode(row, statistics)), statistics

    return encode


def processes_of(config: ConfigWithData) -> int:
    """How many of them work on rows: one for each core that this process may run on, or `threads`."""
    if config.threads:
        return config.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def new_inspection(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    skip_bad_rows: int | None,
    training: Inspection | None,  # of the training set, where this one is held out
    near: bool,
) -> Inspection:
    return Inspection(
        describe_sources(sources),
        find_control_tokens(special_tokens(tokenizer)),
        tokenizer.bos_token_id,
        skip_bad_rows,
        training.index if training else None,
        index=RowIndex(near),
    )


def read_checked(inspection: Inspection, sources: list[Source]) -> Iterator[Row]:
    """The rows of the set, as they pass the checks."""
    return inspection.checked(read_sources(sources, on_bad_row=inspection.refuse))


def check_rows(
    sources: list[Source],
    config: FinetuneConfig | PlanConfig,
    tokenizer: PreTrainedTokenizerBase,
    training: Inspection | None,
    console: Console,
) -> Inspection:
    """Look at every row of a set.

    Raises:
        HalfbyteError: more rows than `skip_bad_rows` would spoil the run.
    """
    inspection = new_inspection(sources, tokenizer, config.skip_bad_rows, training, near=False)
    for _ in with_progress(read_checked(inspection, sources), inspection.name, console):
        pass
    inspection.close()
    return inspection


def read_good(inspection: Inspection, sources: list[Source]) -> Iterator[Row]:
    """The rows that `check_rows` found nothing against that would spoil the run, read once more."""
    rows = read_sources(sources, on_bad_row=lambda _: None)
    return (row for row in rows if row.source not in inspection.bad_sources)


def tell_findings(inspection: Inspection, statistics: EncodingStatistics, console: Console) -> None:
    """What a run says about a set before it begins.

    Raises:
        HalfbyteError: with what the encoder refused, more rows than `skip_bad_rows` would spoil the run.
    """
    for sentence in statistics.refused:
        inspection.refuse(HalfbyteError(sentence))
    findings, notes = inspection.findings, statistics.warnings()
    if findings.bad_rows:
        rows = "1 row is" if findings.bad_rows == 1 else f"{findings.bad_rows:,} rows are"
        notes.insert(0, f"{rows} left out, as skip_bad_rows allows; the first is {findings.first_that_spoils}")
    for name, kind in KINDS.items():
        if not kind.spoils and name in findings.counts and name not in _TOLD_BY_THE_ENCODER:
            notes.append(f"{kind.title}: {findings.counts[name]:,}, the first at {findings.kept[name][0].source}")
    for note in notes:
        console.print(f"  note: {note}", style="yellow", markup=False, highlight=False)


def with_progress(things: Iterable[_T], name: str, console: Console) -> Iterator[_T]:
    """The things, while a line on a terminal tells how many have been looked at."""
    if not console.is_terminal:
        yield from things
        return
    last = time.monotonic()
    with console.status(f"looking at {name}") as status:
        for number, thing in enumerate(things, start=1):
            yield thing
            if time.monotonic() - last > 0.2:
                last = time.monotonic()
                status.update(f"looking at {name}: {number:,} rows")
