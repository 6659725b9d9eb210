"""quantize_8bit and dequantize_8bit: exact nearest codes, bit-equal to the reference in every implementation."""

import pytest
import torch
from oracle import CODEBOOKS_256, SIZES, by_reference, hostile_values

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError


@pytest.mark.parametrize("kind", CODEBOOKS_256)
def test_equals_reference(implementation: str, kind: str) -> None:
    codebook = CODEBOOKS_256[kind]
    for n in SIZES:
        for block_size in (32, 256, 4096):
            for values in (torch.randn(n), hostile_values(n, codebook)):
                expected_codes, expected_absmax = by_reference(ops.quantize_8bit, values, codebook, block_size)
                codes, absmax = ops.quantize_8bit(values, codebook, block_size)
                assert ops.executed_implementation() == implementation
                assert torch.equal(codes, expected_codes)
                assert torch.equal(absmax, expected_absmax)
                expected = by_reference(ops.dequantize_8bit, codes, absmax, codebook, block_size)
                assert torch.equal(ops.dequantize_8bit(codes, absmax, codebook, block_size), expected)
                assert ops.executed_implementation() == implementation


def test_every_code(implementation: str) -> None:
    """A codebook's own entries come back as themselves, and any byte decodes."""
    codebook = CODEBOOKS_256["signed"]
    codes, absmax = ops.quantize_8bit(codebook, codebook, 256)
    assert codes.tolist() == list(range(256))
    assert torch.equal(ops.dequantize_8bit(codes.view(16, 16), absmax, codebook, 256), codebook.view(16, 16))


def test_nearest_is_exact(implementation: str) -> None:
    """No code is nearer, judged in float64, than the one chosen; a midpoint goes to the lower entry."""
    codebook = CODEBOOKS_256["signed"]
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    codes, absmax = ops.quantize_8bit(values, codebook, 4096)
    scaled = (values * (1 / absmax)).double()
    distances = (scaled[:, None] - codebook.double()).abs()
    chosen = distances.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= distances.amin(1) + 2**-26).all()  # half a unit of the midpoint's last place
    midpoints = (codebook[:-1] + codebook[1:]) / 2
    codes, _ = ops.quantize_8bit(torch.cat([midpoints, torch.ones(1)]), codebook, 256)
    assert codes.tolist() == [*range(255), 255]


@pytest.mark.parametrize("n", [1, 31, 33, 4097])
def test_writes_all_of_its_output_and_nothing_else(implementation: str, n: int) -> None:
    values, codebook = torch.randn(n), CODEBOOKS_256["signed"]
    expected, absmax = ops.quantize_8bit(values, codebook, 256)
    restored = ops.dequantize_8bit(expected, absmax, codebook, 256)
    for garbage in (0x00, 0xA5, 0xFF):
        codes = torch.full((n + 64,), garbage, dtype=torch.uint8)
        scratch = torch.empty_like(absmax)
        _C.quantize_8bit(values.data_ptr(), n, 256, codebook.data_ptr(), codes.data_ptr(), scratch.data_ptr(), 2)
        assert torch.equal(codes[:n], expected)
        assert (codes[n:] == garbage).all()
        output = torch.full((4 * n + 64,), garbage, dtype=torch.uint8)
        addresses = expected.data_ptr(), absmax.data_ptr(), codebook.data_ptr()
        _C.dequantize_8bit(*addresses, n, 256, output.data_ptr(), 2)
        assert torch.equal(output[: 4 * n], restored.view(torch.uint8))
        assert (output[4 * n :] == garbage).all()


def test_zeros_and_refusals(implementation: str) -> None:
    codebook = CODEBOOKS_256["signed"]
    codes, absmax = ops.quantize_8bit(torch.zeros(300), codebook, 256)
    assert absmax.tolist() == [0.0, 0.0]
    assert (codebook[codes.long()] == 0).all()
    for bad in (torch.nan, torch.inf):
        values = torch.ones(600)
        values[300] = bad
        with pytest.raises(HalfbyteError, match="elements 256 to 511"):
            ops.quantize_8bit(values, codebook, 256)
        with pytest.raises(HalfbyteError, match="elements 256 to 511"):
            by_reference(ops.quantize_8bit, values, codebook, 256)
    for run in (ops.quantize_8bit, lambda *a: by_reference(ops.quantize_8bit, *a)):
        with pytest.raises(HalfbyteError, match="must ascend"):
            run(torch.ones(8), codebook.flip(0), 256)
    with pytest.raises(HalfbyteError, match="values is 8 elements"):
        ops.quantize_8bit(torch.ones(8, dtype=torch.bfloat16), codebook, 256)
    with pytest.raises(HalfbyteError, match="absmax is 1 elements"):
        ops.dequantize_8bit(torch.zeros(300, dtype=torch.uint8), torch.ones(1), codebook, 256)
