"""What every test has: the same random numbers, no network, and tiny models that are written once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from models import save_model

disable_progress_bar()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random values whatever runs before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny 16-bit model of a known `model_type`, in several shards.  Not to be changed."""
    root = tmp_path_factory.mktemp("models")

    def written(model_type: str = "llama") -> Path:
        directory = root / model_type
        if not directory.exists():
            save_model(directory, model_type, max_shard_size="40KB")
        return directory

    return written
