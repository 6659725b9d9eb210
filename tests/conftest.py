"""What every test has: the same random numbers, and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random values whatever runs before."""
    torch.manual_seed(0)
