"""From what a configuration calls its data to examples: tokenized now, or found in the cache of an earlier run."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from halfbyte.data import (
    EncodingStatistics,
    Example,
    Row,
    Source,
    content_sha256,
    default_cache_dir,
    encode_or_recall,
    is_local,
    rows_sha256,
    set_chat_template,
    source_files,
    tokenizer_sha256,
)
from halfbyte.data.checks import Inspection, encode_checked
from halfbyte.errors import HalfbyteError
from halfbyte.recipes.checking import check_rows, processes_of, read_good, row_encoder, tell_findings
from halfbyte.recipes.data_sources import held_out_sources, training_sources
from halfbyte.recipes.planning import TrainingConfig

# What else decides an example's tokens and mask.
_SETTINGS = (
    "max_length", "truncation", "train_on_source", "train_on_last_turn", "system_prompt",
)  # fmt: skip

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to redraw


def read_data(
    config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, console: Console
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The training and the held-out rows, tokenized and masked; the second is empty where there are none.

    Raises:
        HalfbyteError: a row that cannot be read or learned from, or a cache that cannot be written.
    """
    sets: list[Sequence[Example]] = []
    training: Inspection | None = None
    in_alpaca_prompt = False
    for sources in (training_sources(config), held_out_sources(config)):
        if not sources:
            sets.append([])
            continue
        inspection = check_rows(sources, config, tokenizer, training, console)
        training, name = training or inspection, inspection.name
        examples, statistics = _tokenize(inspection, sources, config, tokenizer, console)
        console.print(
            f"{name}: {statistics.rows:,} rows, {statistics.tokens:,} tokens,"
            f" {statistics.supervised_tokens:,} of them learned; the longest has {statistics.longest}",
            highlight=False,
        )
        tell_findings(inspection, statistics, console)
        if config.system_prompt is not None and statistics.rows_of_text == statistics.rows:
            raise HalfbyteError(f"system_prompt is set, and {name} holds texts with no place for it; leave it out.")
        in_alpaca_prompt |= statistics.rows_in_alpaca_prompt > 0
        if not len(examples):
            why = (
                f": all have more than max_length ({config.max_length}) tokens; raise it, or choose another truncation"
                if statistics.dropped
                else ""
            )
            raise HalfbyteError(f"{name}: no row is left to learn from{why}")
        sets.append(examples)
    if in_alpaca_prompt:  # what they were written in is saved with the adapter, and asked with later
        set_chat_template(tokenizer, "alpaca")
    return sets[0], sets[1]


def _tokenize(
    inspection: Inspection,
    sources: list[Source],
    config: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> tuple[Sequence[Example], EncodingStatistics]:
    encode_row = row_encoder(config, tokenizer)

    def read() -> Iterator[Row]:
        return read_good(inspection, sources)

    def encode(rows: Sequence[Row]) -> tuple[list[Example], EncodingStatistics]:
        return encode_checked(rows, encode_row, tokenizer.bos_token_id, config.skip_bad_rows)

    def made_from() -> dict[str, Any]:
        local = all(is_local(source.path) for source in sources)
        files = [file for source in sources for file in source_files(source)] if local else []
        return {
            "data": [asdict(source) for source in sources],  # as typed: so the examples name their lines
            "left_out": [sorted(inspection.bad_sources), config.skip_bad_rows],
            "content": [content_sha256(file) for file in files] if local else rows_sha256(read()),
            "tokenizer": tokenizer_sha256(tokenizer),
            "settings": {key: getattr(config, key) for key in _SETTINGS},
        }

    directory = Path(config.data_cache_dir) if config.data_cache_dir else default_cache_dir()
    with _Progress(console) as progress:
        return encode_or_recall(read, encode, made_from, directory, processes_of(config), progress.show, progress.say)


class _Progress:
    """How many rows are tokenized: a live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._last_line = time.monotonic()
        self._first_rows: int | None = None
        self._progress = Progress(
            TextColumn("[bold]tokenizing"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("rows {task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()

    def show(self, rows: int) -> None:
        """So many rows are done."""
        now = time.monotonic()
        if self._first_rows is None:
            self._first_rows, self._started, self._last_line = rows, now, now
        figures = f"{(rows - self._first_rows) / max(now - self._started, 1e-9):,.0f} rows/s"
        if self._console.is_terminal:
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task("", total=None, figures="")
            self._progress.update(self._task, completed=rows, figures=figures)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"tokenized {rows:,} rows, {figures}", highlight=False)

    def say(self, sentence: str) -> None:
        self._console.print(f"  note: {sentence}", style="yellow", highlight=False)
