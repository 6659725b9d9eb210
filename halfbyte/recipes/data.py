"""`halfbyte data`: what a run's data hold, what is learned of them, and what is wrong, for a person or a script."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from halfbyte.config import DataConfig
from halfbyte.data import preview
from halfbyte.data.checks import Inspection
from halfbyte.data.masks import special_tokens
from halfbyte.huggingface import prepare_tokenizer
from halfbyte.recipes.checking import new_inspection, processes_of, read_checked, row_encoder, with_progress
from halfbyte.recipes.data_sources import held_out_sources, training_sources
from halfbyte.report.histogram import percentile


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
        return any(not _within_cap(self.config, inspection) for inspection in self.inspections.values())

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
    tokenizer = prepare_tokenizer(config.model_name_or_path, None, config.chat_template, config.system_prompt)
    encode = row_encoder(config, tokenizer)
    inspections: dict[str, Inspection] = {}
    first: list[ShownExample] = []
    for name, sources in (("training", training_sources(config)), ("held out", held_out_sources(config))):
        if not sources:
            continue
        inspection = new_inspection(sources, tokenizer, None, inspections.get("training"), near=True)
        inspection.findings.kept_of_a_kind = findings_shown
        inspections[name] = inspection
        examples = inspection.encoded(read_checked(inspection, sources), encode, processes_of(config))
        for example in with_progress(examples, inspection.name, console):
            if len(first) < shown and name == "training":
                pieces = preview(tokenizer, example)
                first.append(ShownExample(example.source, len(example.input_ids), example.supervised_tokens, pieces))
        inspection.close()
    return DataReport(config, inspections, special_tokens(tokenizer), first)


def _within_cap(config: DataConfig, inspection: Inspection) -> bool:
    """Whether a run goes on with what is left of this set."""
    return inspection.findings.bad_rows <= config.skip_bad_rows and inspection.statistics.examples > 0


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
