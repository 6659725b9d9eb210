"""matmul_4bit_sum: one sum over several weights, no further from float32 than the products one by one."""

import pytest
import torch
from oracle import DTYPES
from test_matmul_4bit import SUMMATION_SLACK, Weight, random_low_rank, random_weight
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import HalfbyteError

# (rows, the out of each, in, block_size, rank): several blocks of the sum, odd lengths, blocks that straddle rows.
SHAPES = [
    (13, (64, 32, 32), 96, 64, 48),
    (1, (7, 1), 37, 32, 0),
    (9, (33,), 61, 64, 3),
    (70, (1100, 5, 130), 200, 64, 16),
    (530, (96, 96), 70, 128, 5),
]


def run(
    weights: list[Weight], xs: list[Tensor], low_rank: tuple[Tensor, Tensor] | None, drop: ops.Dropout | None = None
) -> Tensor:
    terms = [ops.Term(x, w.packed, w.absmax, w.shape[0], w.nested) for x, w in zip(xs, weights, strict=True)]
    return ops.matmul_4bit_sum(terms, weights[0].codebook, weights[0].block_size, weights[0].shape[1], low_rank, drop)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_good_as_reference(
    implementation: str, shape: tuple[int, tuple[int, ...], int, int, int], dtype: torch.dtype
) -> None:
    rows, outs, into, block_size, rank = shape
    for double in (False, True):
        weights = [random_weight((out, into), block_size, double=double) for out in outs]
        xs = [torch.randn(rows, out).to(dtype) for out in outs]
        low_rank = random_low_rank(rows, into, rank, True, dtype) if rank else None
        products = (x.double() @ w.dequantize(dtype).double() for x, w in zip(xs, weights, strict=True))
        exact = sum(products, torch.zeros(()))
        if low_rank is not None:
            exact = exact + low_rank[0].double() @ low_rank[1].double()
        y = run(weights, xs, low_rank)
        with ops.forced_implementation("reference"):
            reference = run(weights, xs, low_rank)
        assert y.shape == (rows, into)
        assert y.dtype == dtype
        error, allowed = (y.double() - exact).norm(), (reference.double() - exact).norm()
        assert error <= 1.02 * allowed + SUMMATION_SLACK * exact.norm()
    assert implementation


def test_one_term_is_the_transposed_product(implementation: str) -> None:
    weight, x = random_weight((130, 77), 64, double=True), torch.randn(3, 5, 130).bfloat16()
    low_rank, drop = random_low_rank(15, 77, 6, True, torch.bfloat16), ops.Dropout(3, 0.4)
    nested = {"nested": weight.nested, "low_rank": low_rank, "dropout": drop}
    constants = weight.packed, weight.absmax, weight.codebook, 64, weight.shape
    assert torch.equal(run([weight], [x], low_rank, drop), ops.matmul_4bit(x, *constants, True, **nested))


def test_strided_rows_and_threads_do_not_show(implementation: str) -> None:
    weights = [random_weight((out, 300), 64) for out in (200, 64)]
    wide = torch.randn(90, 400).bfloat16()
    xs = [wide[:, 10:210], wide[:, 250:314]]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(weights, xs, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    assert torch.equal(run(weights, [x.clone() for x in xs], None), results[0])


def test_nothing_to_multiply() -> None:
    weight = random_weight((8, 64), 64)
    assert run([weight, weight], [torch.ones(0, 8), torch.ones(0, 8)], None).shape == (0, 64)


def test_refusals() -> None:
    plain, double = random_weight((8, 64), 64), random_weight((8, 64), 64, double=True)
    x = torch.ones(2, 8)
    for message, weights, xs in [
        ("there are 9 terms; there must be 1 to 8", [plain] * 9, [x] * 9),
        ("1 of 2 terms are nested", [plain, double], [x, x]),
        ("x of term 1 is 14 elements", [plain, plain], [x, x[:, :7]]),
        ("x of term 1 is .* of torch.bfloat16", [plain, plain], [x, x.bfloat16()]),
    ]:
        with pytest.raises(HalfbyteError, match=message):
            run(weights, xs, None)
