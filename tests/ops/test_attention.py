"""attention and attention_backward: held to the reference by what each is off the float32 result."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_reference
from torch import Tensor

from halfbyte import _C, ops
from halfbyte.errors import HalfbyteError
from halfbyte.ops.attention import cpu as attention_cpu
from halfbyte.ops.attention_backward import cpu as backward_cpu

NAMES = ("out", "logsumexp", "dq", "dk", "dv")
LENGTHS = (1, 2, 17, 63, 64, 65, 129, 513)
HEADS = ((1, 1), (3, 3), (3, 1), (8, 2))
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout


def inputs(
    batch: int, heads: tuple[int, int], queries: int, keys: int, head_dim: int, dtype: torch.dtype, size: float = 1.0
) -> Inputs:
    """In memory (batch, row, head, head_dim), as the projections of a model leave them."""

    def rows(count: int, length: int) -> Tensor:
        return (torch.randn(batch, length, count, head_dim) * size).to(dtype).transpose(1, 2)

    return rows(heads[0], queries), rows(heads[1], keys), rows(heads[1], keys), rows(heads[0], queries)


def run(x: Inputs, starts: Tensor | None = None, window: int = 0, softcap: float = 0.0) -> tuple[Tensor, ...]:
    q, k, v, dout = x
    scale = q.shape[-1] ** -0.5
    out, logsumexp = ops.attention(q, k, v, starts, scale, window, softcap)
    return out, logsumexp, *ops.attention_backward(dout, q, k, v, out, logsumexp, starts, scale, window, softcap)


def assert_no_worse(
    x: Inputs, starts: Tensor | None = None, window: int = 0, softcap: float = 0.0, luck: float = 1.0
) -> None:
    """No further from the reference in float32 than the reference in the type of `x`, and a slack for the order of
    sums: 1e-5 of the largest value, in 16 bits half a unit in its last place; and for dq and dk, where terms cancel,
    eight units in the last float32 place of what cancels. A result of a few numbers can be luckier in one rounding than
    in another, `luck` times."""
    q, k, v, dout = (t.float() for t in x)
    lengths = [t.norm(dim=-1).max() for t in (q, k, v, dout)]
    cancelling = 8 * torch.finfo(torch.float32).eps * q.shape[-1] ** -0.5 * float(lengths[2] * lengths[3])
    terms = {"dq": cancelling * float(k.abs().max()), "dk": cancelling * float(q.abs().max())}
    exact = by_reference(run, (q, k, v, dout), starts, window, softcap)
    usual = by_reference(run, x, starts, window, softcap)
    for name, got, base, want in zip(NAMES, run(x, starts, window, softcap), usual, exact, strict=True):
        assert got.shape == want.shape
        assert got.isfinite().all(), name
        unit = 1e-5 if name == "logsumexp" else max(1e-5, torch.finfo(x[0].dtype).eps / 2)
        slack = unit * max(float(want.abs().max()), 0.1) + terms.get(name, 0.0)
        error, allowed = (got.float() - want).abs().max(), luck * (base.float() - want).abs().max() + slack
        assert error <= allowed, f"{name}: {error} > {allowed}"


def segments(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random packed rows: for each position the first of its own segment."""
    begins = torch.rand(batch, length, generator=generator) < 4 / length
    begins[:, 0] = True
    return (begins * torch.arange(length)).cummax(1).values.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(implementation: str, length: int, dtype: torch.dtype) -> None:
    for heads in HEADS if length < 100 else HEADS[2:3]:
        assert_no_worse(inputs(2, heads, length, length, 64, dtype))


def test_float16(implementation: str) -> None:
    assert_no_worse(inputs(2, (3, 1), 65, 65, 48, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 1, 40, 72])
def test_head_dims(implementation: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_no_worse(inputs(1, (4, 2), 101, 101, head_dim, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 7, 64])
def test_windows_caps_and_segments(implementation: str, window: int, softcap: float, dtype: torch.dtype) -> None:
    starts = segments(2, 130, torch.Generator().manual_seed(window))
    x = inputs(2, (3, 1), 130, 130, 64, dtype, size=2.0)
    assert_no_worse(x, None, window, softcap)
    assert_no_worse(x, starts, window, softcap)


@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (7, 8), (48, 130), (50, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_at_the_end_of_more_keys(implementation: str, queries: int, keys: int, dtype: torch.dtype) -> None:
    for window in (0, 20):
        assert_no_worse(inputs(2, (4, 2), queries, keys, 64, dtype), None, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_equal_rows_alone(implementation: str, dtype: torch.dtype) -> None:
    """One by one, bit for bit in what depends on the row alone: no key of another segment has any weight."""
    lengths = (1, 47, 16, 100, 2, 64)
    x = inputs(1, (4, 2), sum(lengths), sum(lengths), 64, dtype)
    bounds = list(itertools.accumulate(lengths, initial=0))
    starts = torch.cat([torch.full((n,), first) for n, first in zip(lengths, bounds, strict=False)])[None].int()
    packed = run(x, starts)
    for first, last in itertools.pairwise(bounds):
        alone = run(tuple(t[:, :, first:last] for t in x))  # type: ignore[arg-type]
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for name, together, single in zip(NAMES, packed, alone, strict=True):
            torch.testing.assert_close(together[:, :, first:last], single, rtol=tolerance, atol=tolerance, msg=name)


def test_other_segments_have_no_weight_at_all(implementation: str) -> None:
    """Infinities in another segment's keys and values change not a bit."""
    starts = torch.tensor([[0] * 30 + [30] * 40]).int()
    x = inputs(1, (2, 1), 70, 70, 64, torch.bfloat16)
    before = run(x, starts)
    x[1][:, :, :30] = 3e4
    x[2][:, :, :30] = -3e4
    after = run(x, starts)
    for name, first, second in zip(NAMES, before, after, strict=True):
        assert torch.equal(first[:, :, 30:], second[:, :, 30:]), name


def test_large_scores(implementation: str) -> None:
    """Scores in the hundreds, first growing along the keys and then falling: the running maximum moves, or does not."""
    for direction in (1, -1):
        q, k, v, dout = inputs(1, (2, 2), 200, 200, 64, torch.float32)
        ramp = torch.linspace(0, 30, 200)[:, None]
        k = k * (ramp if direction > 0 else ramp.flip(0))
        assert_no_worse((q, k, v, dout))


def test_starts_out_of_range_are_taken_in(implementation: str) -> None:
    """Negative, or beyond the query itself: it sees at least itself."""
    x = inputs(1, (2, 1), 60, 60, 32, torch.float32)
    wild = torch.tensor([[-5, 1000, *range(2, 60)]]).int()
    tame = torch.tensor([[0, 1, *range(2, 60)]]).int()
    for got, want in zip(run(x, wild), run(x, tame), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(implementation: str, dtype: torch.dtype) -> None:
    contiguous = tuple(t.contiguous() for t in inputs(2, (4, 2), 70, 70, 64, dtype))
    expected = run(contiguous)  # type: ignore[arg-type]
    by_row = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in contiguous)
    every_second = tuple(torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in contiguous)
    fused = tuple(torch.cat((t, t), 3)[..., :64] for t in contiguous)
    for x in (by_row, every_second, fused):
        for got, want in zip(run(x), expected, strict=True):  # type: ignore[arg-type]
            assert torch.equal(got, want)


def test_memory_layout() -> None:
    out, _, dq, dk, dv = run(inputs(2, (4, 2), 9, 9, 32, torch.float32))
    for tensor in (out, dq, dk, dv):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 50, 200])
def test_garbage_in_fresh_memory_does_not_show(
    implementation: str, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and workspace full of NaN beforehand: everything is written, and nothing read that was not."""
    x = inputs(1, (4, 2), length, length, 40, dtype)
    expected = run(x)
    empty = torch.empty
    for module in (attention_cpu, backward_cpu):
        monkeypatch.setattr(module.torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
        monkeypatch.setattr(module, "empty", lambda shape, dtype: _poisoned(empty(shape, dtype=dtype)))
    for got, want in zip(run(x), expected, strict=True):
        assert torch.equal(got, want)


def _poisoned(tensor: Tensor) -> Tensor:
    return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor.fill_(torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(3, 1), (6, 2), (4, 4)])
def test_thread_count_does_not_show(implementation: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Heads that share keys are one task or several, depending on the threads: the sums are the same."""
    x = inputs(2, heads, 300, 300, 64, dtype)
    starts = segments(2, 300, torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(x, starts))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_reference_equals_autograd(softcap: float) -> None:
    """The oracle's formulas against torch's own differentiation, in float64."""
    x = tuple(t.double().requires_grad_() for t in inputs(2, (4, 2), 20, 25, 16, torch.float32))
    starts = segments(2, 20, torch.Generator().manual_seed(1))
    from halfbyte.ops.attention import reference
    from halfbyte.ops.attention_backward.reference import attention_backward

    arguments = starts, 0.3, 6, softcap
    out, logsumexp = reference.attention(*x[:3], *arguments)
    want = torch.autograd.grad(out, x[:3], x[3])
    got = attention_backward(x[3], *x[:3], out, logsumexp, *arguments)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # the scores are float32 in between


def test_reference_equals_torch() -> None:
    q, k, v, _ = inputs(2, (4, 4), 33, 33, 32, torch.float32)
    out = by_reference(ops.attention, q, k, v, None, 32**-0.5, 0, 0.0)[0]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from(HEADS),
    queries=st.integers(1, 110),
    more_keys=st.integers(0, 60),
    head_dim=st.sampled_from([8, 16, 33, 64, 96, 128]),
    window=st.integers(0, 200),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_anything(
    batch: int,
    heads: tuple[int, int],
    queries: int,
    more_keys: int,
    head_dim: int,
    window: int,
    softcap: float,
    packed: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    starts = segments(batch, queries, torch.Generator().manual_seed(seed)) + more_keys // 2 if packed else None
    assert_no_worse(inputs(batch, heads, queries, queries + more_keys, head_dim, dtype), starts, window, softcap, 2.0)


def test_refusals() -> None:
    q, k, v, dout = inputs(2, (4, 2), 8, 8, 32, torch.float32)
    out, logsumexp = ops.attention(q, k, v, None, 1.0, 0, 0.0)
    starts = torch.zeros(2, 8, dtype=torch.int32)
    for message, arguments in {
        "3 key heads do not divide 4": (q, k[:, :1].repeat(1, 3, 1, 1), v[:, :1].repeat(1, 3, 1, 1), None, 1.0, 0, 0.0),
        "8 queries and 7 keys": (q, k[:, :, 1:], v[:, :, 1:], None, 1.0, 0, 0.0),
        "k is .* and v": (q, k, v[:, :, 1:], None, 1.0, 0, 0.0),
        "k is torch.bfloat16": (q, k.bfloat16(), v, None, 1.0, 0, 0.0),
        "q is torch.float64": (q.double(), k, v, None, 1.0, 0, 0.0),
        "q has 3 and k 4 dimensions": (q[0], k, v, None, 1.0, 0, 0.0),
        "segment_start is .* of torch.int64": (q, k, v, starts.long(), 1.0, 0, 0.0),
        "window is -1": (q, k, v, starts, 1.0, -1, 0.0),
        "head_dim is 320": (*(t.repeat(1, 1, 1, 10) for t in (q, k, v)), None, 1.0, 0, 0.0),
    }.items():
        with pytest.raises(HalfbyteError, match=message):
            ops.attention(*arguments)
    with pytest.raises(HalfbyteError, match="dout is"):
        ops.attention_backward(dout[:, :2], q, k, v, out, logsumexp, None, 1.0, 0, 0.0)
    with pytest.raises(HalfbyteError, match="logsumexp is"):
        ops.attention_backward(dout, q, k, v, out, logsumexp.double(), None, 1.0, 0, 0.0)


@pytest.mark.parametrize("implementation_name", ["portable", "reference"])
def test_opcheck_and_one_graph(implementation_name: str) -> None:
    q, k, v, dout = inputs(2, (4, 2), 8, 12, 32, torch.float32)
    starts = torch.zeros(2, 8, dtype=torch.int32)
    with ops.forced_implementation(implementation_name):
        out, logsumexp = ops.attention(q, k, v, starts, 0.2, 5, 3.0)
        torch.library.opcheck(torch.ops.halfbyte.attention.default, (q, k, v, starts, 0.2, 5, 3.0))
        backward = (dout, q, k, v, out, logsumexp, starts, 0.2, 5, 3.0)
        torch.library.opcheck(torch.ops.halfbyte.attention_backward.default, backward)
        compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v, starts, 0.2, 5, 3.0)[0], out)


def test_forced_one_is_the_one_that_ran(implementation: str) -> None:
    x = inputs(1, (1, 1), 3, 3, 32, torch.float32)
    run(x)
    assert _C.executed() == ops.executed_implementation() == implementation
