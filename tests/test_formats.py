"""The constants of the formats, from their definitions."""

import math

import numpy as np
import torch

from halfbyte import formats


def test_every_entry_is_exactly_a_float32() -> None:
    for entries in [*formats.CODEBOOKS.values(), formats.DYNAMIC_SIGNED, formats.DYNAMIC_UNSIGNED]:
        assert all(float(np.float32(entry)) == entry for entry in entries)
        assert all(math.copysign(1, entry) == 1 for entry in entries if entry == 0)  # no -0
        assert max(map(abs, entries)) == 1


def test_nf4_is_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: eight values above zero and seven below, evenly spaced in probability."""
    normal = torch.distributions.Normal(0, 1)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9).double())[:-1]
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8).double())[:-1]
    expected = torch.cat([positive, torch.zeros(1).double(), negative]).sort().values
    table = torch.tensor(formats.CODEBOOKS["nf4"], dtype=torch.float64)
    torch.testing.assert_close(table, expected / expected.max(), rtol=0, atol=1e-6)


def test_fp4_and_int4_by_their_bits() -> None:
    # exponent 00 is denormal; then 01 is the largest scale, 10 half of it, 11 a quarter: the order of the format
    fp4 = {0b000: 0, 0b001: 0.0625, 0b010: 8, 0b011: 12, 0b100: 4, 0b101: 6, 0b110: 2, 0b111: 3}
    for code, entry in enumerate(formats.CODEBOOKS["fp4"]):
        assert entry == np.float32((-1) ** (code >> 3) * fp4[code & 7]) / np.float32(12)
    for code, entry in enumerate(formats.CODEBOOKS["int4"]):
        assert entry == np.float32((7 - code if code < 8 else 8 - code) / 7)


def test_dynamic_maps() -> None:
    for signed, entries in ((True, formats.DYNAMIC_SIGNED), (False, formats.DYNAMIC_UNSIGNED)):
        assert len(entries) == 256
        assert list(entries) == sorted(set(entries))
        assert {0.0, 1.0} <= set(entries)
        assert (entries[0] < 0) == signed
        # the decade of 10^i, a tenth of it to all of it, holds 2^(i+6) magnitudes (twice as many unsigned)
        for decade in range(-6, 1):
            inside = [e for e in entries if 10.0 ** (decade - 1) < e < 10.0**decade]
            assert len(inside) == 2 ** (decade + 6 + (not signed))


def test_block_arithmetic() -> None:
    assert [formats.packed_bytes(n) for n in (0, 1, 2, 3, 64)] == [0, 1, 1, 2, 32]
    assert [formats.block_count(n, 64) for n in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]
