"""halfbyte quantize: a 4-bit checkpoint that is whole or not there, and numbers that are those on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte import HalfbyteError, Linear4bit, load_model
from halfbyte.checkpoint.fingerprint import weights_sha256
from halfbyte.recipes import quantize as recipe
from halfbyte.recipes.quantize import quantize


@pytest.fixture
def source(model_directory: Callable[[str], Path]) -> str:
    return str(model_directory("llama"))


def test_what_is_written_and_what_is_told(source: str, tmp_path: Path) -> None:
    result = quantize(source, str(tmp_path / "out"), quant_type="fp4", block_size=128)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    codes = {name: tensor for name, tensor in saved.items() if f"{name}.absmax" in saved}
    assert result.quantized_parameters == 2 * sum(tensor.numel() for tensor in codes.values())
    others = sum(t.numel() for name, t in saved.items() if ".weight." not in name and name not in codes)
    assert result.parameters == result.quantized_parameters + others
    # Codes, absmax, nested absmax, and the four bytes of each offset.
    constants = ("", ".absmax", ".nested_absmax")
    held = sum(saved[f"{name}{suffix}"].nbytes for name in codes for suffix in constants) + 4 * len(codes)
    assert result.bytes == held
    assert result.bits_per_parameter == pytest.approx(8 * held / result.quantized_parameters)
    model, tokenizer = load_model(str(tmp_path / "out"))
    assert weights_sha256(model) == result.sha256
    assert tokenizer.chat_template
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear4bit)
    assert (layer.quant_type, layer.block_size) == ("fp4", 128)


def test_the_model_answers_as_it_does_when_quantized_in_memory(source: str, tmp_path: Path) -> None:
    quantize(source, str(tmp_path / "out"))
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [load_model(path)[0](input_ids).logits for path in (source, str(tmp_path / "out"))]
    assert torch.equal(*logits)


def test_nothing_is_replaced_without_request_and_a_model_only(source: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(source, str(target))
    first = (target / "model.safetensors").read_bytes()
    with pytest.raises(HalfbyteError, match="overwrite_output_dir"):
        quantize(source, str(target), quant_type="fp4")
    assert (target / "model.safetensors").read_bytes() == first
    quantize(source, str(target), quant_type="fp4", overwrite=True)
    assert (target / "model.safetensors").read_bytes() != first
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(HalfbyteError, match="name a new one"):
        quantize(source, str(other), overwrite=True)
    with pytest.raises(HalfbyteError, match="is a file"):
        quantize(source, str(other / "thesis.txt"), overwrite=True)
    assert (other / "thesis.txt").read_text() == "years of work"


def test_a_model_is_not_replaced_by_itself(source: str, tmp_path: Path) -> None:
    for target in (source, f"{source}/../{Path(source).name}"):
        with pytest.raises(HalfbyteError, match="the model itself"):
            quantize(source, target, overwrite=True)
    assert load_model(source)


def test_none_is_no_4_bit_type(source: str, tmp_path: Path) -> None:
    with pytest.raises(HalfbyteError, match="none"):
        quantize(source, str(tmp_path / "out"), quant_type="none")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    quantize(source, str(target))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    original = recipe.load_model

    def on_a_full_disk(*arguments: object) -> object:
        model, tokenizer = original(*arguments)  # type: ignore[arg-type]

        def save(directory: Path) -> None:
            (directory / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        model.save_pretrained = save
        return model, tokenizer

    monkeypatch.setattr(recipe, "load_model", on_a_full_disk)
    with pytest.raises(HalfbyteError, match="No space left"):
        quantize(source, str(target), overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
