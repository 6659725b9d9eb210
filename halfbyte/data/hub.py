"""Data sets of the Hugging Face hub, by their id: `datasets`, which is loaded when one is read.

    owner/name             all of it; `split` says which part
    owner/name:config      one of its configurations
    owner/name:file.jsonl  one of its files

What was fetched once stays in the hub's cache, as Arrow tables that are read a batch at a time.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data.arrow_files import ROWS_PER_BATCH, read_batches
from halfbyte.data.files import is_data_file
from halfbyte.data.records import Record
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from datasets import Dataset

# The QLoRA paper's code calls its data sets by these names (arXiv 2305.14314, appendix B).
PAPER_DATASETS = {
    "alpaca": "tatsu-lab/alpaca",
    "alpaca-clean": "yahma/alpaca-cleaned",
    "chip2": "laion/OIG:unified_chip2.jsonl",
    "self-instruct": "yizhongw/self_instruct:self_instruct",
    "hh-rlhf": "Anthropic/hh-rlhf",
    "longform": "akoksal/LongForm",
    "oasst1": "timdettmers/openassistant-guanaco",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w./-]+)?")


def is_hub_id(path: str) -> bool:
    """Whether this may be a data set of the hub; a data file's name is none."""
    if path in PAPER_DATASETS:
        return True
    return _HUB_ID.fullmatch(path) is not None and (":" in path or not is_data_file(Path(path)))


def read_hub(path: str, split: str) -> Iterator[Record]:
    """The rows of a split, as "path (row n)". Raises HalfbyteError where it cannot be had."""
    dataset = _load(path, split).with_format("arrow")
    return read_batches(dataset.iter(batch_size=ROWS_PER_BATCH), path)


def _load(path: str, split: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repository, _, part = PAPER_DATASETS.get(path, path).partition(":")
    chosen = {"data_files": part} if is_data_file(Path(part)) else {"name": part or None}
    try:
        return load_dataset(repository, split=split, **chosen)
    except (OSError, ValueError, LookupError, RuntimeError, ImportError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise HalfbyteError(
            f"{path}: there is no such file or directory, and as a data set of the hub it cannot be loaded: "
            f"{reason[:300]}"
        ) from error
