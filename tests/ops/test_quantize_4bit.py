"""quantize_4bit: bit-equal to the reference in every implementation, on sizes and values chosen to break it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CODEBOOKS_16, DTYPES, SIZES, by_reference, hostile_values

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError
from halfbyte.formats import BLOCK_SIZES


def assert_equal_to_reference(values: torch.Tensor, codebook: torch.Tensor, block_size: int) -> None:
    expected_packed, expected_absmax = by_reference(ops.quantize_4bit, values, codebook, block_size)
    packed, absmax = ops.quantize_4bit(values, codebook, block_size)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", CODEBOOKS_16)
def test_equals_reference(implementation: str, quant_type: str, dtype: torch.dtype) -> None:
    codebook = CODEBOOKS_16[quant_type]
    for n in SIZES:
        for block_size in (32, 64, 4096):
            assert_equal_to_reference(torch.randn(n).to(dtype), codebook, block_size)
            if dtype != torch.float16:  # the powers of two overflow it
                assert_equal_to_reference(hostile_values(n, codebook).to(dtype), codebook, block_size)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 70), max_size=3),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(list(CODEBOOKS_16)),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape: list[int], block_size: int, dtype: torch.dtype, quant_type: str, seed: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for row in ops.available_implementations():
        if row.available and row.name != "bitsandbytes":
            with ops.forced_implementation(row.name):
                assert_equal_to_reference(values, CODEBOOKS_16[quant_type], block_size)


def test_bytes_by_hand() -> None:
    """The format itself, worked out on paper: order of nibbles, padding, ties, duplicates."""
    nf4, fp4 = CODEBOOKS_16["nf4"], CODEBOOKS_16["fp4"]
    packed, absmax = ops.quantize_4bit(torch.tensor([2.0, -2.0, 0.0]), nf4, 64)
    assert (packed.tolist(), absmax.tolist()) == ([0xF0, 0x77], [2.0])  # the odd one out is joined by zero, code 7
    midpoint = (nf4[8] + nf4[9]) / 2
    packed, _ = ops.quantize_4bit(torch.stack([midpoint, torch.tensor(1.0)]), nf4, 64)
    assert packed.tolist() == [0x8F]
    above = midpoint.nextafter(torch.tensor(1.0))
    packed, _ = ops.quantize_4bit(torch.stack([above, torch.tensor(1.0)]), nf4, 64)
    assert packed.tolist() == [0x9F]
    # Of FP4's two zeros code 0 takes what is at or below zero, code 8 what is above.
    packed, _ = ops.quantize_4bit(torch.tensor([0.0, 1e-9, -1e-9, 1.0]), fp4, 64)
    assert packed.tolist() == [0x08, 0x03]


def test_zero_blocks(implementation: str) -> None:
    values = torch.zeros(192)
    values[64] = 3.0
    for quant_type, zero_code in (("nf4", 0x77), ("fp4", 0x00), ("int4", 0x77)):
        packed, absmax = ops.quantize_4bit(values, CODEBOOKS_16[quant_type], 64)
        assert absmax.tolist() == [0.0, 3.0, 0.0]
        assert set(packed[:32].tolist()) == set(packed[64:].tolist()) == {zero_code}


def test_absmax_whose_reciprocal_overflows(implementation: str) -> None:
    """Below 2^-128 the block is encoded as if its absmax were 1e-38: finite, ordered, never NaN's code."""
    tiny = torch.finfo(torch.float32).smallest_normal / 64
    values = torch.linspace(-tiny, tiny, 64)
    packed, absmax = ops.quantize_4bit(values, CODEBOOKS_16["nf4"], 64)
    assert absmax.item() == tiny
    codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)
    assert (codes.diff() >= 0).all()
    expected = (values.double() / 1e-38).float()
    nearest = (expected[:, None] - CODEBOOKS_16["nf4"]).abs().argmin(1)
    assert torch.equal(codes.long(), nearest)


def test_largest_values(implementation: str) -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([largest, -largest, largest / 2, 1.0] * 16)
    assert_equal_to_reference(values, CODEBOOKS_16["nf4"], 64)
    assert ops.quantize_4bit(values, CODEBOOKS_16["nf4"], 64)[1].item() == largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(implementation: str, bad: float, dtype: torch.dtype) -> None:
    for n, position in ((1, 0), (200, 63), (200, 130), (200, 199), (100_000, 77_777)):
        values = torch.randn(n).to(dtype)
        values[position] = bad
        values[n - 1] = bad
        first = position // 64 * 64
        where = f"elements {first} to {min(first + 64, n) - 1}"
        with pytest.raises(HalfbyteError, match=where):
            ops.quantize_4bit(values, CODEBOOKS_16["nf4"], 64)
        with pytest.raises(HalfbyteError, match=where):
            by_reference(ops.quantize_4bit, values, CODEBOOKS_16["nf4"], 64)


@pytest.mark.parametrize("n", [1, 2, 33, 65, 4097])
def test_writes_all_of_its_output_and_nothing_else(implementation: str, n: int) -> None:
    values, codebook = torch.randn(n), CODEBOOKS_16["nf4"]
    expected_packed, expected_absmax = by_reference(ops.quantize_4bit, values, codebook, 64)
    ops.quantize_4bit(values, codebook, 64)  # selects the implementation
    for garbage in (0x00, 0xA5, 0xFF):
        packed = torch.full((len(expected_packed) + 64,), garbage, dtype=torch.uint8)
        absmax = torch.full((4 * len(expected_absmax) + 64,), garbage, dtype=torch.uint8).view(torch.float32)
        guard = absmax[len(expected_absmax) :].clone().view(torch.int32)
        _C.quantize_4bit(values.data_ptr(), 0, n, 64, codebook.data_ptr(), packed.data_ptr(), absmax.data_ptr(), 2)
        assert torch.equal(packed[: len(expected_packed)], expected_packed)
        assert torch.equal(absmax[: len(expected_absmax)], expected_absmax)
        assert (packed[len(expected_packed) :] == garbage).all()
        assert torch.equal(absmax[len(expected_absmax) :].view(torch.int32), guard)


@pytest.mark.parametrize(("quant_type", "error", "slack"), [("nf4", 0.0728, 0.0005), ("fp4", 0.0965, 0.001)])
def test_mean_error_on_normal_values(quant_type: str, error: float, slack: float) -> None:
    values = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    packed, absmax = ops.quantize_4bit(values, CODEBOOKS_16[quant_type], 64)
    restored = ops.dequantize_4bit(packed, absmax, CODEBOOKS_16[quant_type], 64, [1024, 1024], torch.float32)
    assert (restored - values).abs().mean().item() == pytest.approx(error, abs=slack)


def test_strided_values_and_parameters(implementation: str) -> None:
    weight = torch.nn.Parameter(torch.randn(96, 40))
    packed, absmax = ops.quantize_4bit(weight.t(), CODEBOOKS_16["nf4"], 64)
    expected = ops.quantize_4bit(weight.detach().t().contiguous(), CODEBOOKS_16["nf4"], 64)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    assert not absmax.requires_grad


@pytest.mark.parametrize(
    ("values", "codebook", "block_size", "message"),
    [
        (torch.ones(64, dtype=torch.float64), CODEBOOKS_16["nf4"], 64, "values is torch.float64"),
        (torch.ones(64), CODEBOOKS_16["nf4"], 48, "block_size is 48"),
        (torch.ones(64), CODEBOOKS_16["nf4"], 8192, "block_size is 8192"),
        (torch.ones(64), CODEBOOKS_16["nf4"][:15], 64, "codebook is 15 elements"),
        (torch.ones(64), CODEBOOKS_16["nf4"].half(), 64, "codebook is 16 elements of torch.float16"),
    ],
)
def test_refusals(values: torch.Tensor, codebook: torch.Tensor, block_size: int, message: str) -> None:
    with pytest.raises(HalfbyteError, match=message):
        ops.quantize_4bit(values, codebook, block_size)
