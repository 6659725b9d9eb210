"""dequantize_4bit: bit-equal to the reference in every implementation and output type, rounding included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CODEBOOKS_16, DTYPES, SIZES, bits, by_reference

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError
from halfbyte.formats import BLOCK_SIZES, block_count, packed_bytes


def encoded(n: int, block_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, and absmax from float32's smallest denormal to its largest number."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (packed_bytes(n),), generator=generator, dtype=torch.uint8)
    pattern = torch.randint(0x7F800000, (block_count(n, block_size),), generator=generator, dtype=torch.int32)
    return packed, pattern.view(torch.float32)


def assert_equal_to_reference(
    packed: torch.Tensor, absmax: torch.Tensor, quant_type: str, block_size: int, shape: list[int], dtype: torch.dtype
) -> None:
    arguments = (packed, absmax, CODEBOOKS_16[quant_type], block_size, shape, dtype)
    expected, values = by_reference(ops.dequantize_4bit, *arguments), ops.dequantize_4bit(*arguments)
    assert values.shape == torch.Size(shape)
    assert values.dtype == dtype
    assert torch.equal(bits(values), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", CODEBOOKS_16)
def test_equals_reference(implementation: str, quant_type: str, dtype: torch.dtype) -> None:
    for n in SIZES:
        for block_size in (32, 64, 4096):
            packed, absmax = encoded(n, block_size)
            assert_equal_to_reference(packed, absmax, quant_type, block_size, [n], dtype)
            weights = torch.randn(n)
            packed, absmax = ops.quantize_4bit(weights, CODEBOOKS_16[quant_type], block_size)
            assert_equal_to_reference(packed, absmax, quant_type, block_size, [n], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rounding(implementation: str, dtype: torch.dtype) -> None:
    """Each code times a great many absmax: ties, denormals of the output type, overflow to infinity."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(256)
    for seed in range(8):
        absmax = encoded(2 * len(packed), 32, seed)[1]
        if dtype == torch.float16:
            absmax = absmax.clamp(2.0**-28, 2.0**18) if seed % 2 else torch.rand(len(absmax)) * 2.0**-14
        for quant_type in CODEBOOKS_16:
            assert_equal_to_reference(packed, absmax, quant_type, 32, [2 * len(packed)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_broken_absmax_stays_visible(implementation: str, bad: float, dtype: torch.dtype) -> None:
    """An absmax that a file got wrong must not turn into plausible weights."""
    absmax = torch.tensor([bad, 1.0])
    absmax.view(torch.int32)[0] |= 0x7FFFFF if bad != bad else 0  # every payload bit, which rounding would carry
    values = ops.dequantize_4bit(
        torch.full((64,), 0x0F, dtype=torch.uint8), absmax, CODEBOOKS_16["nf4"], 64, [128], dtype
    )
    assert not values[:64].isfinite().any()
    assert values[64:].isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 70), max_size=3),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(list(CODEBOOKS_16)),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape: list[int], block_size: int, dtype: torch.dtype, quant_type: str, seed: int) -> None:
    packed, absmax = encoded(torch.Size(shape).numel(), block_size, seed)
    for row in ops.available_implementations():
        if row.available and row.name != "bitsandbytes":
            with ops.forced_implementation(row.name):
                assert_equal_to_reference(packed, absmax, quant_type, block_size, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 33, 65, 4097])
def test_writes_all_of_its_output_and_nothing_else(implementation: str, n: int, dtype: torch.dtype) -> None:
    packed, absmax = encoded(n, 64)
    codebook = CODEBOOKS_16["nf4"]
    expected = ops.dequantize_4bit(packed, absmax, codebook, 64, [n], dtype)
    for garbage in (0x00, 0xA5, 0xFF):
        used = n * dtype.itemsize
        output = torch.full((used + 64,), garbage, dtype=torch.uint8)
        addresses = packed.data_ptr(), absmax.data_ptr(), codebook.data_ptr()
        _C.dequantize_4bit(*addresses, n, 64, output.data_ptr(), DTYPES.index(dtype), 2)
        assert torch.equal(output[:used], expected.view(torch.uint8))
        assert (output[used:] == garbage).all()


def test_stored_shape_and_strides(implementation: str) -> None:
    """bitsandbytes stores packed codes as a column; views may come strided."""
    packed, absmax = encoded(640, 64)
    expected = ops.dequantize_4bit(packed, absmax, CODEBOOKS_16["nf4"], 64, [10, 64], torch.bfloat16)
    strided = torch.stack((packed, packed), 1)[:, :1]
    codebook = torch.stack((CODEBOOKS_16["nf4"], torch.zeros(16)), 1)[:, 0]
    values = ops.dequantize_4bit(strided, absmax.repeat_interleave(2)[::2], codebook, 64, [10, 64], torch.bfloat16)
    assert torch.equal(bits(values), bits(expected))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ([129], torch.float32, "packed is 64 elements of torch.uint8 on cpu; it must be 65"),
        ([128], torch.float64, "dtype is torch.float64"),
    ],
)
def test_refusals(shape: list[int], dtype: torch.dtype, message: str) -> None:
    packed, absmax = encoded(128, 64)
    with pytest.raises(HalfbyteError, match=message):
        ops.dequantize_4bit(packed, absmax, CODEBOOKS_16["nf4"], 64, shape, dtype)
    with pytest.raises(HalfbyteError, match="absmax is 1 elements"):
        ops.dequantize_4bit(packed, absmax[:1], CODEBOOKS_16["nf4"], 64, [128], torch.float32)
