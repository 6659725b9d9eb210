"""QuantizedTensor: what it costs, what it gives back, and what it refuses."""

import math

import pytest
import torch

from halfbyte import HalfbyteError, QuantizedTensor, formats, quantize_4bit
from halfbyte.quant import DoubleQuantized

QUANT_TYPES = list(formats.CODEBOOKS)
SHAPES = [(0,), (1,), (3, 5), (64,), (192, 576), (7, 3, 11), (1, 16385)]


@pytest.mark.parametrize("shape", [(4096, 4096), (192, 576)])
def test_nf4_with_double_quantization_takes_4_128_bits(shape: tuple[int, int]) -> None:
    quantized = quantize_4bit(torch.randn(shape, dtype=torch.bfloat16))
    nested = quantized.absmax
    assert isinstance(nested, DoubleQuantized)
    # From the tensors that are really held, not from the property alone.
    held = quantized.packed.untyped_storage().nbytes() + nested.codes.untyped_storage().nbytes()
    held += nested.absmax.untyped_storage().nbytes() + 4
    assert quantized.nbytes == held
    assert quantized.bits_per_parameter == 8 * held / math.prod(shape)
    assert 4.125 < quantized.bits_per_parameter <= 4.128


def test_without_double_quantization_the_absmax_takes_half_a_bit() -> None:
    assert quantize_4bit(torch.randn(256, 256), double_quant=False).bits_per_parameter == 4.5


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_round_trip_keeps_shape_and_dtype_and_is_near(
    shape: tuple[int, ...], quant_type: str, double_quant: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        quantized = quantize_4bit(weight, quant_type, double_quant=double_quant)
        back = quantized.dequantize()
        assert (back.shape, back.dtype) == (weight.shape, dtype)
        assert quantized.packed.shape == ((weight.numel() + 1) // 2, 1)
        # A step between two codes is at most 0.34 of a block's absmax (FP4, from 4/12 to 8/12), so half of that.
        error = (quantized.dequantize(torch.float32) - weight.float()).abs()
        assert (error <= 0.18 * max(1e-9, weight.float().abs().max().item() if weight.numel() else 1)).all()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_without_double_quantization_the_definition_holds_to_the_bit(quant_type: str) -> None:
    weight = torch.randn(40, 50)
    quantized = quantize_4bit(weight, quant_type, 32, double_quant=False)
    codes = torch.stack((quantized.packed[:, 0] >> 4, quantized.packed[:, 0] & 15), 1).flatten()[:2000].long()
    absmax = torch.stack([block.abs().max() for block in weight.flatten().split(32)])
    expected = torch.tensor(formats.CODEBOOKS[quant_type])[codes] * absmax.repeat_interleave(32)[:2000]
    assert torch.equal(quantized.absmax_float32(), absmax)
    assert torch.equal(quantized.dequantize(), expected.view(40, 50))


def test_double_quantized_constants_are_near_and_follow_the_formula() -> None:
    weight = torch.randn(512, 512) * torch.rand(512, 1)
    plain, nested = quantize_4bit(weight, double_quant=False), quantize_4bit(weight)
    assert torch.equal(plain.packed, nested.packed)
    assert isinstance(nested.absmax, DoubleQuantized)
    # The mean to the last bit of float32, and the exact nearest of the 256 codes.
    assert nested.absmax.offset == float(plain.absmax_float32().double().mean().float())
    codebook = torch.tensor(formats.DYNAMIC_SIGNED)
    centred = (plain.absmax_float32() - nested.absmax.offset).view(-1, 256)
    scale = centred.abs().amax(1)
    assert torch.equal(nested.absmax.absmax, scale)
    error = (codebook[nested.absmax.codes.long()].view(-1, 256) - centred / scale[:, None]).abs()
    best = (codebook - (centred / scale[:, None])[..., None]).abs().amin(-1)
    assert torch.allclose(error, best, atol=1e-6, rtol=0)
    expected = codebook[nested.absmax.codes.long()] * scale.repeat_interleave(256) + nested.absmax.offset
    assert torch.equal(nested.absmax_float32(), expected)


def test_a_tensor_that_is_a_view_is_read_row_major() -> None:
    weight = torch.randn(48, 80)
    assert torch.equal(quantize_4bit(weight.T).packed, quantize_4bit(weight.T.contiguous()).packed)
    assert not torch.equal(quantize_4bit(weight.T).packed, quantize_4bit(weight).packed)


def test_the_same_weight_gives_the_same_bytes_whatever_the_threads() -> None:
    weight = torch.randn(300, 700)
    threads = torch.get_num_threads()
    try:
        results: list[QuantizedTensor] = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(quantize_4bit(weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other.packed, results[0].packed)
        assert isinstance(other.absmax, DoubleQuantized)
        assert isinstance(results[0].absmax, DoubleQuantized)
        assert other.absmax.offset == results[0].absmax.offset
        assert torch.equal(other.absmax.codes, results[0].absmax.codes)
        assert torch.equal(other.absmax.absmax, results[0].absmax.absmax)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.randn(16, 64)
    weight[3, 5] = bad
    with pytest.raises(HalfbyteError, match="elements 192 to 255"):
        quantize_4bit(weight)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"quant_type": "nf5"}, "nf4, fp4, int4"),
        ({"block_size": 48}, "block_size"),
        ({"block_size": 16}, "block_size"),
        ({"block_size": 8192}, "block_size"),
    ],
)
def test_unknown_settings_are_refused(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(HalfbyteError, match=word):
        quantize_4bit(torch.randn(64, 64), **arguments)  # type: ignore[arg-type]


def test_a_tensor_of_integers_is_refused() -> None:
    with pytest.raises(HalfbyteError, match="int64"):
        quantize_4bit(torch.arange(64))
