"""adamw_8bit_step: exact nearest codes, the reference's numbers on every instruction set, the same bits however many
threads there are."""

import pytest
import torch
from oracle import CODEBOOKS_256, by_reference, hostile_values
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import HalfbyteError
from halfbyte.formats import OPTIMIZER_BLOCK_SIZE, block_count

SIZES = (1, 3, 255, 256, 257, 8191, 8192, 8193, 40_000, 0)
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
BLOCK = OPTIMIZER_BLOCK_SIZE
Tensors = list[list[Tensor]]


def state(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Tensors:
    """Parameters, gradients (some of them zero, some tiny), and moments with all kinds of codes."""
    generator = torch.Generator().manual_seed(seed)
    parameters, grads = ([torch.randn(size, generator=generator) for size in sizes] for _ in range(2))
    for grad in grads:
        grad[::7] = 0
        grad[::5] *= 1e-20
    moments: Tensors = []
    for _ in range(2):
        moments.append([torch.randint(256, (size,), generator=generator, dtype=torch.uint8) for size in sizes])
        moments.append([torch.rand(block_count(size, BLOCK), generator=generator) for size in sizes])
    return [parameters, grads, *moments]


def zeros(n: int) -> list[Tensor]:
    blocks = block_count(n, BLOCK)
    return [dtyped for _ in range(2) for dtyped in (torch.zeros(n, dtype=torch.uint8), torch.zeros(blocks))]


def same(mine: Tensors, other: Tensors) -> bool:
    pairs = zip(mine, other, strict=True)
    return all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("n", [1, 255, 300, 100_000])
def test_codes_are_the_nearest_ones(implementation: str, n: int) -> None:
    """With both betas 0 the moments are g and g², so what they must be encoded as is known to the bit."""
    for seed, map_of_values in enumerate(("signed", "unsigned")):
        grad = hostile_values(n, CODEBOOKS_256[map_of_values], seed)
        if map_of_values == "unsigned":
            grad = grad.abs().sqrt()
        moments = zeros(n)
        ops.adamw_8bit_step([torch.ones(n)], [grad], *([t] for t in moments), 1e-3, 0.0, 0.0, 1e-8, 0.0, 1)
        assert ops.executed_implementation() == implementation
        for kind, values, codes, absmax in (
            ("signed", grad, *moments[:2]),
            ("unsigned", grad * grad, *moments[2:]),
        ):
            expected = by_reference(ops.quantize_8bit, values, CODEBOOKS_256[kind], BLOCK)
            assert torch.equal(absmax, expected[1])
            assert torch.equal(codes, expected[0])


@pytest.mark.parametrize("step", [1, 1000])
def test_equals_reference(implementation: str, step: int) -> None:
    ours, theirs = state(), state()
    ops.adamw_8bit_step(*ours, **SETTINGS, step=step)
    assert ops.executed_implementation() == implementation
    by_reference(lambda: ops.adamw_8bit_step(*theirs, **SETTINGS, step=step))
    for name, mine, other in zip("pgmavb", ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            if name in "mv":  # a rounding of the value can move it across a midpoint, to the neighbouring code
                differing = (a.int() - b.int()).abs()
                assert differing.sum() <= len(a) * 1e-3
                assert differing.numel() == 0 or differing.max() <= 1
            else:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert same([ours[1]], [state()[1]])  # the gradients


def test_it_is_the_32_bit_step_on_decoded_moments(implementation: str) -> None:
    """The parameter moves by the new moments as they are before they are rounded to codes."""
    parameters, grads, m, m_absmax, v, v_absmax = state()
    wide = [parameter.clone() for parameter in parameters]
    decoded = [
        [ops.dequantize_8bit(c, a, CODEBOOKS_256[kind], BLOCK) for c, a in zip(codes, absmaxs, strict=True)]
        for kind, codes, absmaxs in (("signed", m, m_absmax), ("unsigned", v, v_absmax))
    ]
    ops.adamw_step(wide, grads, *decoded, **SETTINGS, step=5)
    ops.adamw_8bit_step(parameters, grads, m, m_absmax, v, v_absmax, **SETTINGS, step=5)
    assert same([parameters], [wide])
    for kind, values, codes, absmaxs in (("signed", decoded[0], m, m_absmax), ("unsigned", decoded[1], v, v_absmax)):
        for value, code, absmax in zip(values, codes, absmaxs, strict=True):
            expected = ops.quantize_8bit(value, CODEBOOKS_256[kind], BLOCK)
            assert torch.equal(code, expected[0])
            assert torch.equal(absmax, expected[1])


def test_neither_threads_nor_places_show(implementation: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tensors = state()
            ops.adamw_8bit_step(*tensors, **SETTINGS, step=3)
            results.append(tensors)
    finally:
        torch.set_num_threads(before)
    alone = state()
    for one in zip(*alone, strict=True):
        ops.adamw_8bit_step(*([tensor] for tensor in one), **SETTINGS, step=3)
    assert all(same(result, alone) for result in results)


def test_a_block_that_is_not_finite_becomes_nan_and_no_other(implementation: str) -> None:
    for bad in (torch.nan, torch.inf):
        outcomes = []
        for run in (lambda call: call(), by_reference):
            (parameter,), (grad,), *moments = state((600,))
            grad[300] = bad
            run(lambda p=parameter, g=grad, m=moments: ops.adamw_8bit_step([p], [g], *m, **SETTINGS, step=2))
            m_absmax, v_absmax = moments[1][0], moments[3][0]
            for absmax in (m_absmax, v_absmax):
                assert absmax.isnan().tolist() == [False, True, False]
            outcomes.append([moments[0][0][256:512], moments[2][0][256:512]])
            assert parameter[300].isnan()
            assert parameter[:256].isfinite().all()
        assert same([outcomes[0]], [outcomes[1]])


def test_it_writes_its_output_and_nothing_else(implementation: str) -> None:
    n, margin = 300, 64
    expected = state((n,))
    ops.adamw_8bit_step(*expected, **SETTINGS, step=2)
    inner, outer = [], []
    for (tensor,) in state((n,)):
        padded = torch.full((len(tensor) + 2 * margin,), 7, dtype=tensor.dtype)
        padded[margin:-margin] = tensor
        outer.append(padded)
        inner.append([padded[margin:-margin]])
    ops.adamw_8bit_step(*inner, **SETTINGS, step=2)
    assert same(inner, expected)
    assert all((t[:margin] == 7).all() and (t[-margin:] == 7).all() for t in outer)


def test_strided_gradient(implementation: str) -> None:
    grad, results = torch.randn(60, 40).t(), []
    for given in (grad, grad.contiguous()):
        parameter = torch.ones(40, 60)
        ops.adamw_8bit_step([parameter], [given], *([t] for t in zeros(2400)), **SETTINGS, step=1)
        results.append(parameter)
    assert torch.equal(*results)


def test_refusals() -> None:
    parameters, grads, m, m_absmax, v, v_absmax = state((300,))
    with pytest.raises(HalfbyteError, match=r"a exp_avg is 300 elements of torch\.float32"):
        ops.adamw_8bit_step(parameters, grads, grads, m_absmax, v, v_absmax, **SETTINGS, step=1)
    with pytest.raises(HalfbyteError, match="a exp_avg_sq_absmax is 300 elements"):
        ops.adamw_8bit_step(parameters, grads, m, m_absmax, v, grads, **SETTINGS, step=1)
    with pytest.raises(HalfbyteError, match="a parameter has strides"):
        ops.adamw_8bit_step([torch.ones(20, 15).t()], grads, m, m_absmax, v, v_absmax, **SETTINGS, step=1)
    ops.adamw_8bit_step([], [], [], [], [], [], **SETTINGS, step=1)


def test_torch_sees_one_node() -> None:
    tensors = state((300, 7))
    torch.library.opcheck(torch.ops.halfbyte.adamw_8bit_step.default, (*tensors, 1e-2, 0.9, 0.999, 1e-8, 0.1, 3))
