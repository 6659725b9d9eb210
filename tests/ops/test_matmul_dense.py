"""matmul_dense, and the mask that it and matmul_4bit drop by."""

import pytest
import torch
from oracle import DTYPES, by_reference
from test_matmul_4bit import random_low_rank, random_weight
from torch import Tensor

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError

# (rows, depth, columns): one side of rank 8, 16, 5, 64; odd lengths; several tasks and blocks of the sum.
SHAPES = [(1, 64, 8), (7, 96, 16), (33, 37, 5), (16, 530, 200), (130, 2100, 64), (600, 70, 16), (5, 3, 1), (2, 1, 3)]
DROPOUT = ops.Dropout(seed=0x0123456789ABCDEF, probability=0.3)


def operands(shape: tuple[int, int, int], dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor]:
    rows, depth, columns = shape
    return torch.randn(rows, depth).to(dtype), torch.randn((depth, columns) if transpose else (columns, depth)).to(
        dtype
    )


def exact_product(x: Tensor, w: Tensor, transpose: bool, scale: float, dropout: ops.Dropout | None) -> Tensor:
    x, w = x.double(), w.double()
    if dropout is not None:
        large = w if transpose else x
        large *= dropout.kept(*large.shape)
    return x @ (w if transpose else w.t()) * scale


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropped"])
@pytest.mark.parametrize("transpose", [False, True], ids=["across", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_good_as_reference(
    implementation: str, dtype: torch.dtype, transpose: bool, dropout: ops.Dropout | None
) -> None:
    for shape in SHAPES:
        x, w = operands(shape, dtype, transpose)
        exact = exact_product(x, w, transpose, 1.7, dropout)
        for result in (dtype, torch.float32):
            y = ops.matmul_dense(x, w, transpose, 1.7, dropout, result)
            assert ops.executed_implementation() == implementation
            reference = by_reference(ops.matmul_dense, x, w, transpose, 1.7, dropout, result)
            assert y.dtype == result
            assert y.shape == exact.shape
            # Slack: float32 sums in another order, over terms that mostly cancel.
            allowed = (
                1.02 * (reference.double() - exact).norm()
                + 4e-6 * exact_product(x.abs(), w.abs(), transpose, 1.7, dropout).norm()
            )
            assert (y.double() - exact).norm() <= allowed


@pytest.mark.parametrize("transpose", [False, True], ids=["across", "transposed"])
def test_rows_may_be_strided(implementation: str, transpose: bool) -> None:
    for dtype in DTYPES:
        x, w = operands((9, 40, 33), dtype, transpose)
        expected = ops.matmul_dense(x, w, transpose)
        for wide in (torch.nn.functional.pad(x, (3, 9)), torch.nn.functional.pad(x, (4, 9))):
            first = 3 if torch.equal(wide[:, 3:43], x) else 4
            assert torch.equal(ops.matmul_dense(wide[:, first : first + 40], w, transpose), expected)
        columns_first = x.t().contiguous().t(), w.t().contiguous().t()
        assert torch.equal(ops.matmul_dense(*columns_first, transpose), expected)


def test_no_rows_and_no_sum(implementation: str) -> None:
    assert ops.matmul_dense(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert torch.equal(ops.matmul_dense(torch.ones(2, 0), torch.ones(3, 0)), torch.zeros(2, 3))


@pytest.mark.parametrize("transpose", [0, 1], ids=["across", "transposed"])
def test_writes_all_of_its_output_and_nothing_else(implementation: str, transpose: int) -> None:
    for dtype in DTYPES:
        for rows, depth, columns in ((3, 64, 33), (20, 40, 16), (16, 34, 130)):
            x, w = operands((rows, depth, columns), dtype, bool(transpose))
            for result in (dtype, torch.float32):
                expected = ops.matmul_dense(x, w, bool(transpose), dtype=result)
                used = expected.nbytes
                y = torch.full((used + 64,), 0xFF, dtype=torch.uint8)  # NaN in every type
                _C.matmul_dense(
                    *(x.data_ptr(), depth, w.data_ptr(), w.stride(0), DTYPES.index(dtype), rows, depth, columns),
                    *(bool(transpose), 1.0, 0, 0, y.data_ptr(), result == torch.float32, 2),
                )
                assert torch.equal(y[:used].view(result).view(rows, columns), expected)
                assert (y[used:] == 0xFF).all()


# ── The mask ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_the_references(implementation: str, dtype: torch.dtype) -> None:
    """Rows of the identity pick the matrix out, so that what was dropped can be seen."""
    for rows, columns in ((5, 64), (70, 97), (3, 1300)):
        kept = DROPOUT.kept(rows, columns)
        ones = torch.ones(rows, columns, dtype=dtype)
        across = ops.matmul_dense(ones, torch.eye(columns, dtype=dtype), False, 1.0, DROPOUT)
        assert torch.equal(across, kept.to(dtype))
        along = ops.matmul_dense(torch.eye(rows, dtype=dtype), ones, True, 1.0, DROPOUT)
        assert torch.equal(along, kept.to(dtype))
        weight = random_weight((40, columns), 32)
        low_rank = torch.ones(rows, 2, dtype=dtype), torch.ones(2, columns, dtype=dtype)
        nothing = torch.zeros(rows, 40, dtype=dtype)
        constants = weight.packed, weight.absmax, weight.codebook, 32, weight.shape, True
        y = ops.matmul_4bit(nothing, *constants, low_rank=low_rank, dropout=DROPOUT)
        assert torch.equal(y, 2 * kept.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_low_rank_term_is_dropped(implementation: str, dtype: torch.dtype) -> None:
    for rows, columns, rank in ((9, 64, 16), (70, 97, 5), (1, 40, 3)):
        weight = random_weight((50, columns), 64, double=True)
        dy = torch.randn(rows, 50).to(dtype)
        low_rank = random_low_rank(rows, columns, rank, True, dtype)
        low = low_rank[0].double() @ low_rank[1].double()
        exact = dy.double() @ weight.dequantize(dtype).double() + low * DROPOUT.kept(rows, columns)
        constants = weight.packed, weight.absmax, weight.codebook, 64, weight.shape, True
        arguments = {"nested": weight.nested, "low_rank": low_rank, "dropout": DROPOUT}
        y = ops.matmul_4bit(dy, *constants, **arguments)
        with ops.forced_implementation("reference"):
            reference = ops.matmul_4bit(dy, *constants, **arguments)
        assert (y.double() - exact).norm() <= 1.02 * (reference.double() - exact).norm() + 4e-6 * exact.norm()


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.5, 0.9])
def test_as_many_are_dropped_as_asked(probability: float) -> None:
    rows, columns = 512, 1001
    for seed in (0, 1, 2**32, 2**63 - 1):
        dropped = ~ops.Dropout(seed, probability).kept(rows, columns)
        sigma = (probability * (1 - probability) / dropped.numel()) ** 0.5
        assert abs(dropped.double().mean() - probability) < 5 * sigma + 2**-16
        # Neither rows nor columns nor neighbours know of each other.
        for sums, length in ((dropped.sum(0), rows), (dropped.sum(1), columns)):
            spread = sums.double().var() / (length * probability * (1 - probability))
            assert 0.7 < spread < 1.3
        for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1]), (dropped[:, 2:], dropped[:, :-2])):
            both = (a & b).double().mean()
            p = probability**2
            assert abs(both - p) < 6 * (p * (1 - p) / a.numel()) ** 0.5 + 2**-15


def test_other_seeds_give_other_masks() -> None:
    masks = [ops.Dropout(seed, 0.5).kept(64, 64) for seed in (0, 1, 2, 2**31, 2**32, 2**33, 2**62)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < (a == b).double().mean() < 0.6


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = [ops.Dropout.draw(0.1).seed for _ in range(3)]
    torch.manual_seed(5)
    assert [ops.Dropout.draw(0.1).seed for _ in range(3)] == first
    assert len(set(first)) == 3


def test_all_and_nothing() -> None:
    x, w = torch.randn(4, 32), torch.randn(2, 32)
    assert torch.equal(ops.matmul_dense(x, w, dropout=ops.Dropout(1, 1.0)), torch.zeros(4, 2))
    assert torch.equal(ops.matmul_dense(x, w, dropout=ops.Dropout(1, 0.0)), ops.matmul_dense(x, w))


@pytest.mark.parametrize(
    ("x", "w", "dtype", "message"),
    [
        (torch.ones(4, 3), torch.ones(2, 4), None, "x is 12 elements"),
        (torch.ones(4, 3), torch.ones(2, 3).half(), None, "w is 6 elements of torch.float16"),
        (torch.ones(4, 3), torch.ones(6), None, "2 and 1 dimensions"),
        (torch.ones(4, 3).half(), torch.ones(2, 3).half(), torch.bfloat16, "dtype is torch.bfloat16"),
    ],
)
def test_refusals(x: Tensor, w: Tensor, dtype: torch.dtype | None, message: str) -> None:
    with pytest.raises(HalfbyteError, match=message):
        ops.matmul_dense(x, w, dtype=dtype)
