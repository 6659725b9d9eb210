"""The norms of W + s·B·A are those of the dense sum, and neither B·A nor the sum is made."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.nn import row_norms, row_squares
from halfbyte.quant import quantize_4bit


@pytest.mark.parametrize(("out", "into", "rank"), [(64, 96, 16), (7, 13, 2), (33, 576, 8)])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_norms_are_those_of_the_dense_sum(out: int, into: int, rank: int, size: float) -> None:
    quantized = quantize_4bit(torch.randn(out, into) * 0.05)
    lora_A, lora_B = torch.randn(rank, into) * size, torch.randn(out, rank) * size
    exact = (quantized.dequantize(torch.float32).double() + 2.0 * lora_B.double() @ lora_A.double()).norm(dim=1)
    norms = row_norms(quantized, row_squares(quantized), lora_A, lora_B, 2.0)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


def test_a_row_that_the_adapter_takes_away_has_a_norm_of_nearly_zero() -> None:
    quantized = quantize_4bit(torch.randn(8, 64))
    weight = quantized.dequantize(torch.float32)
    norms = row_norms(quantized, row_squares(quantized), -weight, torch.eye(8), 1.0)
    assert norms.isfinite().all()
    assert norms.max() < 1e-2 * weight.norm(dim=1).min()


def test_no_tensor_of_the_weights_size_is_made() -> None:
    quantized = quantize_4bit(torch.randn(96, 128))
    squares = row_squares(quantized)
    made: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in [result] if isinstance(t, torch.Tensor))
            return result

    with Record():
        row_norms(quantized, squares, torch.randn(4, 128), torch.randn(96, 4), 1.0)
    assert made
    assert max(made) < 96 * 128 / 2
