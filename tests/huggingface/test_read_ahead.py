"""What follows a tensor in its file is asked for once, in requests of some size, and never from before it."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.huggingface import read_ahead
from halfbyte.huggingface.read_ahead import ReadAhead


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no such request")
def test_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"{index}": torch.zeros(64, 128) for index in range(8)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", 100_000)
    monkeypatch.setattr(read_ahead, "_REQUEST_BYTES", 50_000)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, size, advice: asked.append((begin, size)))
    ahead = ReadAhead(tmp_path)
    for index in range(4):
        ahead.reached(f"{index}")
    ahead.reached("not there")
    first, second = asked  # 32 KiB a tensor: another 50 kB are due at the third
    header = (tmp_path / "model.safetensors").stat().st_size - 8 * 32768
    assert first == (header + 32768, 100_000)
    assert second == (first[0] + 100_000, 65536)
