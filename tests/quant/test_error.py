"""How far a quantized tensor is from what was quantized: for each type and block size, never more than it should be."""

import pytest
import torch

from halfbyte import formats, ops, quantize_4bit
from halfbyte.quant import codebook_8bit

# The mean error and the mean relative error of 1,048,576 standard normal values, and the deviation of each from sample
# to sample: over 60 samples, without double quantization. bitsandbytes' codes have the same ones.
EXPECTED = {
    ("nf4", 32): ((0.067737, 0.000066), (0.189689, 0.000296)),
    ("nf4", 64): ((0.072795, 0.000078), (0.203307, 0.000324)),
    ("nf4", 128): ((0.076833, 0.000094), (0.215249, 0.000350)),
    ("nf4", 256): ((0.080333, 0.000106), (0.226081, 0.000369)),
    ("nf4", 512): ((0.083558, 0.000130), (0.236110, 0.000450)),
    ("nf4", 1024): ((0.086630, 0.000175), (0.245470, 0.000518)),
    ("nf4", 2048): ((0.089627, 0.000221), (0.254280, 0.000628)),
    ("nf4", 4096): ((0.092575, 0.000301), (0.262612, 0.000819)),
    ("fp4", 32): ((0.088917, 0.000092), (0.242432, 0.000350)),
    ("fp4", 64): ((0.096554, 0.000114), (0.260202, 0.000376)),
    ("fp4", 128): ((0.102952, 0.000143), (0.275797, 0.000419)),
    ("fp4", 256): ((0.108707, 0.000180), (0.289951, 0.000486)),
    ("fp4", 512): ((0.114124, 0.000237), (0.303000, 0.000592)),
    ("fp4", 1024): ((0.119389, 0.000296), (0.315212, 0.000686)),
    ("fp4", 2048): ((0.124549, 0.000396), (0.326660, 0.000836)),
    ("fp4", 4096): ((0.129653, 0.000532), (0.337475, 0.001039)),
}
# What rounding to 16 bits adds to the relative error: values that are rounded before, and again after.
ROUNDING = {torch.float32: 0.0, torch.float16: 0.0005, torch.bfloat16: 0.004}


def errors(values: torch.Tensor, restored: torch.Tensor) -> tuple[float, float]:
    """Mean absolute and mean relative error."""
    error = (values.float() - restored.float()).abs()
    return error.mean().item(), (error / values.float().abs().clamp(min=1e-8)).mean().item()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("quant_type", "block_size"), EXPECTED, ids=str)
def test_4_bit_error_of_normal_values(quant_type: str, block_size: int, dtype: torch.dtype) -> None:
    values = torch.randn(1024, 1024).to(dtype)
    found = errors(values, quantize_4bit(values, quant_type, block_size, double_quant=False).dequantize())
    for error, (mean, deviation) in zip(found, EXPECTED[quant_type, block_size], strict=True):
        assert abs(error - mean) < 7 * deviation + ROUNDING[dtype]


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantization_adds_little_to_it(quant_type: str, block_size: int) -> None:
    for _ in range(3):
        values = torch.randn(1024, 1024)
        plain = errors(values, quantize_4bit(values, quant_type, block_size, double_quant=False).dequantize())
        nested = errors(values, quantize_4bit(values, quant_type, block_size, double_quant=True).dequantize())
        assert nested[0] < 0.11
        assert nested[1] < 0.28
        assert nested[0] < 1.005 * plain[0]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(8, 512, 256), (8, 64, 32), (3, 5, 7), (2, 3, 4, 5)], ids=str)
def test_the_weights_of_experts_keep_their_shape_and_each_its_error(shape: tuple[int, ...], quant_type: str) -> None:
    weights = torch.randn(shape)
    restored = quantize_4bit(weights, quant_type).dequantize()
    assert restored.shape == weights.shape
    if weights[0].numel() >= 2048:
        for expert, back in zip(weights, restored, strict=True):
            absolute, relative = errors(expert, back)
            assert absolute < (0.085 if quant_type == "nf4" else 0.11)
            assert relative < (0.25 if quant_type == "nf4" else 0.31)


@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_8_bit_error(block_size: int) -> None:
    signed, unsigned = codebook_8bit(torch.device("cpu")), torch.tensor(formats.DYNAMIC_UNSIGNED)
    for values, codebook, absolute, relative in (
        (torch.randn(1024, 1024), signed, 0.011, 0.018),
        (torch.rand(1024, 1024), signed, 0.0036, 0.015),
        (torch.rand(1024, 1024), unsigned, 0.0023, 0.012),
    ):
        codes, absmax = ops.quantize_8bit(values, codebook, block_size)
        restored = ops.dequantize_8bit(codes, absmax, codebook, block_size)
        found = errors(values.flatten(), restored)
        assert found[0] < absolute
        assert found[1] < relative
