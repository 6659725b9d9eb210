"""Weights lent by their file's pages while they are quantized: the same codes, and nothing of the file kept after."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte import Linear4bit, load_model, quantize_4bit
from halfbyte.huggingface import lent
from halfbyte.huggingface.lent import Lender
from models import save_model

SIZES = {"hidden_size": 128, "intermediate_size": 264, "head_dim": 32, "vocab_size": 512}  # matrices over 16 KiB

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc/self/maps to read")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("lent"), "llama", **SIZES)


@pytest.fixture(params=[0, 64 << 20], ids=["given back at once", "given back late"])
def most_lent_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "_MOST_LENT_BYTES", request.param)


@pytest.mark.usefixtures("most_lent_bytes")
def test_codes_are_those_of_the_file_s_values(checkpoint: Path) -> None:
    values = load_file(checkpoint / "model.safetensors")
    model, _ = load_model(str(checkpoint))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert layers
    for name, layer in layers.items():
        expected = quantize_4bit(values[f"{name}.weight"])
        assert torch.equal(layer.quantized.packed, expected.packed), name
        assert torch.equal(layer.quantized.absmax_float32(), expected.absmax_float32()), name
    assert torch.equal(model.get_input_embeddings().weight, values["model.embed_tokens.weight"])


@needs_proc
@pytest.mark.usefixtures("most_lent_bytes")
def test_what_stays_in_16_bits_is_the_model_s_own(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    model, _ = load_model(str(checkpoint))
    gc.collect()
    assert str(checkpoint) not in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.zero_()  # a page of the file would end the process
    assert (checkpoint / "model.safetensors").read_bytes() == before


@needs_proc
def test_a_part_of_a_lent_tensor_that_a_model_keeps_is_copied(tmp_path: Path) -> None:
    save_file({"fused": torch.arange(1 << 14, dtype=torch.float32).view(128, 128)}, tmp_path / "model.safetensors")
    lender = Lender(tmp_path)
    model = nn.Module()
    model.part = nn.Parameter(lender.tensors["fused"][...][64:], requires_grad=False)
    lender.settle(model)
    del lender
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert model.part[0, 0] == 64 * 128


def test_a_system_that_cannot_ask_for_pages_at_once_reads_them_as_they_are_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, model_bytes: Callable[[Path], bytes]
) -> None:
    wanted = model_bytes(checkpoint)
    monkeypatch.setattr("halfbyte.huggingface.mapped._MADV_POPULATE_READ", 12345)  # no such advice: EINVAL
    assert model_bytes(checkpoint) == wanted


@pytest.fixture
def model_bytes() -> Callable[[Path], bytes]:
    def of(directory: Path) -> bytes:
        model, _ = load_model(str(directory))
        tensors = model.state_dict().values()
        return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)

    return of
