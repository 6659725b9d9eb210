"""What `dataset` and `eval_dataset` say, entry by entry, as the data folder takes it."""

from halfbyte.config import DatasetEntry
from halfbyte.config.keys import DataKeys, HeldOutKeys
from halfbyte.data import Source


def training_sources(config: DataKeys) -> list[Source]:
    """Where the rows of `dataset` are; [] where it is not said."""
    return _sources(config, config.dataset, config.dataset_split)


def held_out_sources(config: DataKeys) -> list[Source]:
    """Where the rows of `eval_dataset` are; [] where there is none."""
    if not isinstance(config, HeldOutKeys):
        return []
    return _sources(config, config.eval_dataset, config.eval_dataset_split)


def _sources(config: DataKeys, dataset: str | list[str | DatasetEntry] | None, split: str | None) -> list[Source]:
    sources = []
    for entry in dataset if isinstance(dataset, list) else [dataset] if dataset is not None else []:
        own = DatasetEntry.model_validate({"path": entry}) if isinstance(entry, str) else entry
        sources.append(
            Source(
                own.path,
                own.weight,
                own.split or split,
                own.dataset_format or config.dataset_format,
                own.columns or config.columns,
            )
        )
    return sources


def describe_sources(sources: list[Source]) -> str:
    """For a person: "rows.jsonl", "rows.jsonl train[:5000]", "a.jsonl and 2 more"."""
    first = f"{sources[0].path} {sources[0].split}" if sources[0].split else sources[0].path
    return f"{first} and {len(sources) - 1} more" if len(sources) > 1 else first
