"""What every test has: the same random numbers, no network, and tiny models that are written once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

import halfbyte
from models import save_model

REAL_MODELS = Path(__file__).parents[1] / "models"

disable_progress_bar()


def pytest_configure() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and all that comes of it: some tests press it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random values whatever runs before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model that `make model` fetches."""
    file = REAL_MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        pytest.skip(f"{file.name} is not there: make model fetches it")
    return file


@pytest.fixture(scope="session")
def smollm2_directory(smollm2_gguf: Path) -> Path:
    """The same in 16 bits, as safetensors: written once, beside it."""
    directory = REAL_MODELS / "SmolLM2-135M-Instruct"
    if not directory.exists():
        model, tokenizer = halfbyte.load_model(str(smollm2_gguf), quant_type="none", fast=False)
        aside = directory.with_name(f"{directory.name}.{os.getpid()}")  # two test processes may both be at it
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(directory)
        except OSError:
            shutil.rmtree(aside)
    return directory


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
