"""The order of a safetensors file's tensors: the same tensors, readable by everybody, the large ones aligned."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.alignment import align_tensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ä": "ö"}])
def test_the_same_tensors_at_multiples_of_64(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {
        "b.codes": torch.randint(256, (6400, 1), dtype=torch.uint8),
        "a.codes": torch.randint(256, (64, 1), dtype=torch.uint8),
        "a.odd": torch.randint(256, (77,), dtype=torch.uint8),
        "a.float": torch.randn(3),
        "a.half": torch.randn(5).bfloat16(),
        "b.matrix": torch.randn(32, 33).bfloat16(),
        "b.empty": torch.zeros(0, 3),
        "b.scalar": torch.tensor(1.5),
    }
    save_file(tensors, file, metadata)
    assert any(offset % 64 for name, offset in offsets_of(file).items() if name.endswith("codes"))
    align_tensors(file)
    saved = load_file(file)
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor), name
        assert saved[name].dtype == tensor.dtype
    offsets = offsets_of(file)
    assert all(offsets[name] % 64 == 0 for name in ("a.codes", "b.codes", "b.matrix"))
    assert all(offset % tensors[name].itemsize == 0 for name, offset in offsets.items())
    with safe_open(file, "pt") as opened:
        assert (opened.metadata() or {}) == (metadata or {})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again = file.read_bytes()
    align_tensors(file)
    assert file.read_bytes() == again


def offsets_of(file: Path) -> dict[str, int]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
