"""matmul_4bit: no further from the float32 result than the dense product of the dequantized weight is."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CODEBOOKS_16, CODEBOOKS_256, DTYPES
from torch import Tensor

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError
from halfbyte.formats import BLOCK_SIZES

# A sum of products in another order: some units of the last place of float32, which is what is left of the error when
# the inputs are float32 too.
SUMMATION_SLACK = 4e-6


@dataclass
class Weight:
    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    block_size: int
    shape: tuple[int, int]
    nested: ops.Nested | None = None

    def matmul(self, x: Tensor, transpose: bool = False, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        constants = self.packed, self.absmax, self.codebook, self.block_size, self.shape
        return ops.matmul_4bit(x, *constants, transpose=transpose, nested=self.nested, low_rank=low_rank)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        absmax = self.absmax
        if self.nested is not None:
            absmax = ops.dequantize_8bit(absmax, self.nested.absmax, self.nested.codebook, 256) + self.nested.offset
        return ops.dequantize_4bit(self.packed, absmax, self.codebook, self.block_size, list(self.shape), dtype)


def random_weight(shape: tuple[int, int], block_size: int, quant_type: str = "nf4", double: bool = False) -> Weight:
    codebook = CODEBOOKS_16[quant_type]
    packed, absmax = ops.quantize_4bit(torch.randn(shape) * 0.05, codebook, block_size)
    if not double:
        return Weight(packed, absmax, codebook, block_size, shape)
    offset = float(absmax.mean())
    codes, nested = ops.quantize_8bit(absmax - offset, CODEBOOKS_256["signed"], 256)
    return Weight(packed, codes, codebook, block_size, shape, ops.Nested(nested, CODEBOOKS_256["signed"], offset))


def random_low_rank(rows: int, columns: int, rank: int, transpose: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    right = torch.randn(rank, columns) if transpose else torch.randn(columns, rank)
    return torch.randn(rows, rank).to(dtype), (right * 0.1).to(dtype)


def assert_as_good_as_reference(
    weight: Weight, x: Tensor, transpose: bool, low_rank: tuple[Tensor, Tensor] | None, slack: float = 1.02
) -> None:
    dense = weight.dequantize(x.dtype).double()
    exact = x.double() @ (dense if transpose else dense.t())
    if low_rank is not None:
        left, right = (factor.double() for factor in low_rank)
        exact = exact + left @ (right if transpose else right.t())
    y = weight.matmul(x, transpose, low_rank)
    with ops.forced_implementation("reference"):
        reference = weight.matmul(x, transpose, low_rank)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    error, allowed = (y.double() - exact).norm(), (reference.double() - exact).norm()
    assert error <= slack * allowed + SUMMATION_SLACK * exact.norm()


# (rows, out, in, block_size, rank): whole tiles, ragged ones, decoding, blocks that straddle rows, odd lengths, one of
# everything, several blocks of the sum, several tasks.
SHAPES = [
    (12, 128, 64, 64, 0),
    (13, 64, 96, 32, 16),
    (1, 128, 256, 64, 8),
    (8, 130, 96, 32, 5),
    (5, 33, 37, 32, 3),
    (9, 1, 1, 32, 1),
    (2, 7, 2048, 4096, 64),
    (37, 61, 133, 128, 7),
    (100, 200, 1100, 64, 16),
    (530, 300, 70, 64, 16),
]


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_reference(
    implementation: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, transpose: bool
) -> None:
    rows, out, into, block_size, rank = shape
    for double in (False, True):
        weight = random_weight((out, into), block_size, double=double)
        x = torch.randn(rows, out if transpose else into).to(dtype)
        low_rank = random_low_rank(rows, into if transpose else out, rank, transpose, dtype) if rank else None
        assert_as_good_as_reference(weight, x, transpose, low_rank)
    assert implementation


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    rank=st.integers(0, 40),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(sorted(CODEBOOKS_16)),
    double=st.booleans(),
    transpose=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(
    rows: int,
    shape: tuple[int, int],
    rank: int,
    block_size: int,
    quant_type: str,
    double: bool,
    transpose: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(shape, block_size, quant_type, double)
    x = torch.randn(rows, shape[0] if transpose else shape[1]).to(dtype)
    low_rank = random_low_rank(rows, shape[1] if transpose else shape[0], rank, transpose, dtype) if rank else None
    for row in ops.available_implementations():
        if row.available and row.name not in ("bitsandbytes", "reference"):
            with ops.forced_implementation(row.name):
                # A result of a few numbers can be luckier in one rounding than in another.
                assert_as_good_as_reference(weight, x, transpose, low_rank, slack=1.5)


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_those_of_dequantize(implementation: str, dtype: torch.dtype, transpose: bool) -> None:
    """Rows of the identity pick weights out: every one is bit for bit what dequantize_4bit gives in that dtype."""
    for size in (65, 96):
        weight = random_weight((size, size), 32, double=True)
        dense = weight.dequantize(dtype)
        assert torch.equal(weight.matmul(torch.eye(size, dtype=dtype), transpose), dense if transpose else dense.t())
        if not transpose:
            assert torch.equal(weight.matmul(torch.eye(size, dtype=dtype)[:5]), dense.t()[:5])


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("rows", [3, 20])
def test_strided_inputs(implementation: str, rows: int, transpose: bool) -> None:
    weight = random_weight((96, 96), 64)
    for dtype in (torch.bfloat16, torch.float32):
        wide = torch.randn(2, rows, 200).to(dtype)
        low_rank = random_low_rank(2 * rows, 96, 16, transpose, dtype)
        left = low_rank[0].view(2, rows, 16)
        strided = torch.cat([left, left], -1)[..., :16], low_rank[1].t().contiguous().t()
        for view in (wide[..., 3:99], wide[..., ::2][..., :96], wide.transpose(0, 1)[..., :96].transpose(0, 1)):
            expected = weight.matmul(view.contiguous(), transpose, (left, low_rank[1]))
            assert torch.equal(weight.matmul(view, transpose, strided), expected)


def test_no_rows_and_no_sum(implementation: str) -> None:
    weight = random_weight((6, 8), 32)
    assert weight.matmul(torch.ones(0, 8)).shape == (0, 6)
    assert weight.matmul(torch.ones(2, 0, 6), transpose=True).shape == (2, 0, 8)
    nothing = Weight(torch.empty(0, dtype=torch.uint8), torch.empty(0), CODEBOOKS_16["nf4"], 64, (3, 0))
    assert torch.equal(nothing.matmul(torch.ones(2, 0)), torch.zeros(2, 3))


@pytest.mark.parametrize("transpose", [0, 1], ids=["forward", "transposed"])
@pytest.mark.parametrize(("rows", "out", "into"), [(1, 33, 64), (7, 33, 65), (20, 70, 129), (61, 128, 96)])
def test_writes_all_of_its_output_and_nothing_else(
    implementation: str, rows: int, out: int, into: int, transpose: int
) -> None:
    weight = random_weight((out, into), 64)
    depth, columns = (out, into) if transpose else (into, out)
    for dtype in DTYPES:
        x = torch.nn.functional.pad(torch.randn(rows, depth).to(dtype), (0, 1))
        expected = weight.matmul(x[:, :depth], bool(transpose))
        used = rows * columns * dtype.itemsize
        for garbage in (0x00, 0xFF):  # the second is NaN in every type
            y = torch.full((used + 64,), garbage, dtype=torch.uint8)
            term = x.data_ptr(), x.stride(0), weight.packed.data_ptr(), weight.absmax.data_ptr(), 0, 0, 0.0, out
            _C.matmul_4bit(
                *([term], DTYPES.index(dtype), rows, 0, weight.codebook.data_ptr()),
                *(64, into, bool(transpose)),
                *(0, 0, 0, 0, 0, 0, y.data_ptr(), 2),
            )
            assert torch.equal(y[:used].view(dtype).view(rows, columns), expected)
            assert (y[used:] == garbage).all()


def test_what_lies_beside_a_row_is_not_read(implementation: str) -> None:
    """Zero times a neighbour that is infinite would be NaN."""
    for depth in (65, 66, 95):
        weight = random_weight((40, depth), 32)
        for rows in (2, 20):
            for dtype in DTYPES:
                wide = torch.full((rows, depth + 40), torch.nan).to(dtype)
                wide[:, 1 : depth + 1] = torch.randn(rows, depth).to(dtype)
                x = wide[:, 1 : depth + 1]
                assert torch.equal(weight.matmul(x), weight.matmul(x.clone()))


def test_broken_absmax_stays_visible(implementation: str) -> None:
    weight = random_weight((64, 64), 64)
    weight.absmax[3] = torch.nan
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 20):
            broken = weight.matmul(torch.ones(rows, 64, dtype=dtype)).isnan()
            assert broken[:, 3].all()
            assert broken.sum() == rows


def test_runs_repeat(implementation: str) -> None:
    weight = random_weight((300, 576), 64, double=True)
    x = torch.randn(130, 576).bfloat16()
    first = weight.matmul(x)
    assert all(torch.equal(weight.matmul(x), first) for _ in range(5))


@pytest.mark.parametrize(
    ("x", "low_rank", "message"),
    [
        (torch.ones(4, 63), None, "x is 252 elements of torch.float32 on cpu; it must be 256"),
        (torch.ones(4, 64, dtype=torch.float64), None, "dtype of x is torch.float64"),
        (torch.ones(4, 64), (torch.ones(3, 2), torch.ones(96, 2)), "t is 6 elements"),
        (torch.ones(4, 64), (torch.ones(4, 2), torch.ones(2, 64)), "B is 128 elements"),
        (torch.ones(4, 64), (torch.ones(4, 2), torch.ones(96, 2).half()), "B is 192 elements of torch.float16"),
    ],
)
def test_refusals(x: Tensor, low_rank: tuple[Tensor, Tensor] | None, message: str) -> None:
    weight = random_weight((96, 64), 64)
    with pytest.raises(HalfbyteError, match=message):
        weight.matmul(x, low_rank=low_rank)


def test_constants_that_do_not_fit_are_refused() -> None:
    weight = random_weight((96, 64), 64, double=True)
    assert weight.nested is not None
    weight.nested = weight.nested._replace(codebook=weight.nested.codebook[:16])
    with pytest.raises(HalfbyteError, match="nested codebook is 16 elements"):
        weight.matmul(torch.ones(4, 64))
    weight.nested = None
    with pytest.raises(HalfbyteError, match=r"absmax is 96 elements of torch\.uint8"):
        weight.matmul(torch.ones(4, 64))
