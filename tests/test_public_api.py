"""The public names: all there, defined elsewhere, typed, and found without loading what is not asked for."""

import importlib
import subprocess
import sys
from typing import get_type_hints

import pytest

import halfbyte


def test_every_name_is_there_and_no_other() -> None:
    assert halfbyte.__all__ == sorted(halfbyte.__all__)
    assert set(dir(halfbyte)) == set(halfbyte.__all__)
    for name in halfbyte.__all__:
        assert getattr(halfbyte, name) is not None


def test_the_names_of_the_contract() -> None:
    names = {"quantize_4bit", "QuantizedTensor", "Linear4bit", "load_model", "add_lora", "finetune", "optim"}
    names |= {"QuantizationConfig", "FinetuneConfig", "RunResult", "HalfbyteError", "merge"}
    assert names <= set(halfbyte.__all__)
    assert halfbyte.optim.AdamW.__module__ == "halfbyte.optim.adamw"


@pytest.mark.parametrize("name", sorted(set(halfbyte.__all__) - {"optim"}))
def test_nothing_is_defined_at_the_top(name: str) -> None:
    value = getattr(halfbyte, name)
    assert value.__module__.startswith("halfbyte.")
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value
    assert value.__doc__


def test_functions_are_typed() -> None:
    for function in (halfbyte.quantize_4bit, halfbyte.load_model, halfbyte.add_lora, halfbyte.finetune):
        assert "return" in get_type_hints(function)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        halfbyte.quantise  # noqa: B018


@pytest.mark.parametrize(
    ("used", "heavy"),
    [
        ("pass", {"torch", "numpy", "transformers", "peft"}),
        ("halfbyte.FinetuneConfig", {"torch", "transformers", "peft"}),
        ("halfbyte.quantize_4bit, halfbyte.Linear4bit, halfbyte.optim", {"transformers", "peft"}),
    ],
)
def test_what_is_not_asked_for_is_not_imported(used: str, heavy: set[str]) -> None:
    code = f"import sys, halfbyte; {used}; sys.exit(str({heavy} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr == "set()\n"


def test_the_example_of_the_contract() -> None:
    import torch

    quantized = halfbyte.quantize_4bit(torch.randn(64, 128), quant_type="nf4", block_size=64, double_quant=True)
    assert quantized.dequantize(torch.float32).shape == quantized.shape == (64, 128)
    assert (quantized.quant_type, quantized.block_size) == ("nf4", 64)
    assert quantized.nbytes * 8 / 8192 == quantized.bits_per_parameter
    linear = torch.nn.Linear(128, 64)
    layer = halfbyte.Linear4bit.from_linear(
        linear, quant_type="nf4", block_size=64, double_quant=True, compute_dtype=torch.bfloat16
    )
    assert isinstance(layer.quantized, halfbyte.QuantizedTensor)
