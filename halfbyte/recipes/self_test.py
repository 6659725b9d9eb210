"""Every op in every implementation that runs here, against its reference; with its speed.

Codes and dequantized weights have to be equal byte for byte. Elsewhere arithmetic in another order is allowed: a result
may be no further from the one that the reference computes in float32 than the reference in bfloat16 is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.formats import CODEBOOKS, DYNAMIC_SIGNED, DYNAMIC_UNSIGNED, NESTED_BLOCK_SIZE, OPTIMIZER_BLOCK_SIZE

REFERENCE = "reference"
VALUES = 2**20  # about, in each op's largest argument: a few megabytes
SECONDS_A_CHECK = 0.05  # of repetitions, after one that is not counted
SLACK = 0.05  # of the reference's own error: two correct roundings of nearly equal numbers differ by some of it
FLOOR = 1e-6  # relative: float32 arithmetic in another order

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpCheck:
    """One op in one implementation."""

    op: str
    implementation: str
    passed: bool
    detail: str
    seconds: float  # of the fastest call
    values_per_second: float


@dataclass(frozen=True)
class _Case:
    op: str
    values: int
    make: Callable[[torch.dtype], Call]  # new arguments, rounded to bfloat16 and held in the dtype
    exact: bool = False


def self_test(implementations: list[str]) -> list[OpCheck]:
    """Check and time every op on the CPU in the implementations named; seconds."""
    return [check for case in _cases(VALUES) for check in _check(case, implementations)]


def _check(case: _Case, implementations: list[str]) -> list[OpCheck]:
    with ops.forced_implementation(REFERENCE):
        oracle = case.make(torch.float32)()
        reference = case.make(torch.bfloat16)()
    checks = []
    for name in implementations:
        with ops.forced_implementation(name):
            call = case.make(torch.bfloat16)
            got = call()
            passed, detail = _equal(got, reference) if case.exact else _no_worse(got, reference, oracle)
            seconds = _fastest(call)
        checks.append(OpCheck(case.op, name, passed, detail, seconds, case.values / seconds))
    return checks


def _equal(got: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> tuple[bool, str]:
    for ours, theirs in zip(got, reference, strict=True):
        wrong = int((ours.view(torch.uint8) != theirs.view(torch.uint8)).sum())
        if wrong:
            return False, f"{wrong:,} of {theirs.nbytes:,} bytes differ from the reference"
    return True, "equal to the reference, byte for byte"


def _no_worse(got: tuple[Tensor, ...], reference: tuple[Tensor, ...], oracle: tuple[Tensor, ...]) -> tuple[bool, str]:
    worst = 0.0
    for ours, theirs, exact in zip(got, reference, oracle, strict=True):
        error, allowed = _error(ours, exact), _error(theirs, exact) * (1 + SLACK) + FLOOR
        if not error <= allowed:  # NaN is not either
            return False, f"{error:.2e} from the float32 result, where the reference is {allowed:.2e}"
        worst = max(worst, error)
    return True, f"{worst:.2e} from the float32 result, no more than the reference"


def _error(got: Tensor, exact: Tensor) -> float:
    """Root mean square distance, relative to the result."""
    distance = (got.double() - exact.double()).square().mean().sqrt()
    return float(distance / exact.double().square().mean().sqrt().clamp(min=1e-30))


def _fastest(call: Call) -> float:
    best = float("inf")
    end = time.perf_counter() + SECONDS_A_CHECK
    while (started := time.perf_counter()) < end or best == float("inf"):
        call()
        best = min(best, time.perf_counter() - started)
    return best


# ── The arguments: odd sizes, so that every loop's tail is run; a block of zeros, and outliers ───────────────────────


def _cases(values: int) -> list[_Case]:
    products = [_product(values), _sum(values), _dense(values), *_attention(values), _decode(values)]
    blocks = [*_norms(values), *_gates(values), _rotary(values), _loss(values)]
    return [*_quantization(values), *products, *blocks, _adamw(values), _adamw_8bit(values)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def _quantization(values: int) -> list[_Case]:
    n = values + 37
    x = _random(n)
    x[64:128] = 0.0
    x[::4099] *= 50.0
    nf4, signed = torch.tensor(CODEBOOKS["nf4"]), torch.tensor(DYNAMIC_SIGNED)
    with ops.forced_implementation(REFERENCE):
        packed, absmax = ops.quantize_4bit(x, nf4, 64)
        codes, nested_absmax = ops.quantize_8bit(x, signed, NESTED_BLOCK_SIZE)
    dequantize_8bit = (codes, nested_absmax, signed, NESTED_BLOCK_SIZE)
    return [
        _Case("quantize_4bit", n, lambda dtype: lambda: ops.quantize_4bit(x.to(dtype), nf4, 64), exact=True),
        _Case(
            "dequantize_4bit",
            n,
            lambda dtype: lambda: (ops.dequantize_4bit(packed, absmax, nf4, 64, [n], dtype),),
            exact=True,
        ),
        _Case("quantize_8bit", n, lambda _: lambda: ops.quantize_8bit(x, signed, NESTED_BLOCK_SIZE), exact=True),
        _Case("dequantize_8bit", n, lambda _: lambda: (ops.dequantize_8bit(*dequantize_8bit),), exact=True),
    ]


def _product(values: int) -> _Case:
    """Throughput in multiplications with weights, of the two directions together."""
    rows, width = 61, 193
    height = values // (8 * width) + 1
    weight, x, dy = _random(height, width), _random(rows, width, seed=1), _random(rows, height, seed=2)
    nf4 = torch.tensor(CODEBOOKS["nf4"])
    with ops.forced_implementation(REFERENCE):
        packed, absmax = ops.quantize_4bit(weight, nf4, 64)

    def make(dtype: torch.dtype) -> Call:
        constants = packed, absmax, nf4, 64, (height, width)
        rounded = x.to(dtype), dy.to(dtype)
        return lambda: tuple(
            ops.matmul_4bit(given, *constants, transpose)
            for given, transpose in zip(rounded, (False, True), strict=True)
        )

    return _Case("matmul_4bit", 2 * rows * weight.numel(), make)


def _sum(values: int) -> _Case:
    """Two weights that read one input; throughput in multiplications with weights."""
    rows, width = 61, 193
    heights = values // (16 * width) + 1, values // (16 * width) + 8
    nf4, weights = torch.tensor(CODEBOOKS["nf4"]), [0.1 * _random(height, width, seed=height) for height in heights]
    with ops.forced_implementation(REFERENCE):
        quantized = [ops.quantize_4bit(weight, nf4, 64) for weight in weights]
    t, A = _random(rows, 16, seed=1), 0.1 * _random(16, width, seed=2)

    def make(dtype: torch.dtype) -> Call:
        terms = [
            ops.Term(_random(rows, height, seed=3).to(dtype), *constants, height)
            for height, constants in zip(heights, quantized, strict=True)
        ]
        return lambda: (ops.matmul_4bit_sum(terms, nf4, 64, width, (t.to(dtype), A.to(dtype)), ops.Dropout(3, 0.1)),)

    return _Case("matmul_4bit_sum", rows * sum(weight.numel() for weight in weights), make)


def _dense(values: int) -> _Case:
    """Throughput in values of the large side."""
    width = 577
    x, w = _random(values // width + 1, width), _random(16, width, seed=1)

    def make(dtype: torch.dtype) -> Call:
        arguments = x.to(dtype), w.to(dtype)
        return lambda: (ops.matmul_dense(*arguments, False, 2.0, ops.Dropout(3, 0.1)),)

    return _Case("matmul_dense", x.numel(), make)


def _attention(values: int) -> list[_Case]:
    """Two packed texts and grouped queries; throughput in scores."""
    heads, kv_heads, head_dim = 4, 2, 64
    length = int((values / heads) ** 0.5) | 1
    q, dout = _random(1, heads, length, head_dim), _random(1, heads, length, head_dim, seed=1)
    k, v = _random(1, kv_heads, length, head_dim, seed=2), _random(1, kv_heads, length, head_dim, seed=3)
    start = torch.zeros(1, length, dtype=torch.int32)
    start[:, length // 3 :] = length // 3
    scale = 1 / float(head_dim) ** 0.5
    with ops.forced_implementation(REFERENCE):
        out, logsumexp = ops.attention(q, k, v, start, scale, 0, 0.0)

    def forward(dtype: torch.dtype) -> Call:
        arguments = q.to(dtype), k.to(dtype), v.to(dtype)
        return lambda: ops.attention(*arguments, start, scale, 0, 0.0)

    def backward(dtype: torch.dtype) -> Call:
        arguments = dout.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype), out.to(dtype)
        return lambda: ops.attention_backward(*arguments, logsumexp, start, scale, 0, 0.0)

    scores = heads * length * length
    return [_Case("attention", scores, forward), _Case("attention_backward", scores, backward)]


def _norms(values: int) -> list[_Case]:
    width = 577
    x, grad = _random(values // width + 1, width), _random(values // width + 1, width, seed=1)
    weight, bias, eps = _random(width, seed=2), _random(width, seed=3), 1e-5
    with ops.forced_implementation(REFERENCE):
        rms_rstd = ops.rms_norm(x, weight, eps)[1]
        mean, rstd = ops.layer_norm(x, weight, bias, eps)[1:]

    def forward(dtype: torch.dtype) -> Call:
        arguments = x.to(dtype), weight.to(dtype)
        return lambda: ops.rms_norm(*arguments, eps)

    def backward(dtype: torch.dtype) -> Call:
        arguments = grad.to(dtype), x.to(dtype), weight.to(dtype)
        return lambda: (ops.rms_norm_backward(*arguments, rms_rstd),)

    def layer_forward(dtype: torch.dtype) -> Call:
        arguments = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return lambda: ops.layer_norm(*arguments, eps)

    def layer_backward(dtype: torch.dtype) -> Call:
        arguments = grad.to(dtype), x.to(dtype), weight.to(dtype)
        return lambda: (ops.layer_norm_backward(*arguments, mean, rstd),)

    return [
        _Case("rms_norm", x.numel(), forward),
        _Case("rms_norm_backward", x.numel(), backward),
        _Case("layer_norm", x.numel(), layer_forward),
        _Case("layer_norm_backward", x.numel(), layer_backward),
    ]


def _gates(values: int) -> list[_Case]:
    width = 577
    grad, gate, up = (_random(values // width + 1, width, seed=seed) for seed in range(3))

    def forward(dtype: torch.dtype) -> Call:
        arguments = gate.to(dtype), up.to(dtype)
        return lambda: (ops.gated(*arguments, "silu"),)

    def backward(dtype: torch.dtype) -> Call:
        arguments = grad.to(dtype), gate.to(dtype), up.to(dtype)
        return lambda: (ops.gated_backward(*arguments, "silu"),)

    return [_Case("gated", gate.numel(), forward), _Case("gated_backward", gate.numel(), backward)]


def _rotary(values: int) -> _Case:
    heads, head_dim = 9, 64
    length = values // (heads * head_dim) + 1
    x = _random(1, heads, length, head_dim)
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = (wave(torch.cat((angle, angle), dim=1))[None].bfloat16().float() for wave in (torch.cos, torch.sin))

    def make(dtype: torch.dtype) -> Call:
        arguments = x.to(dtype), cos.to(dtype), sin.to(dtype)
        return lambda: (ops.rotary(*arguments),)

    return _Case("rotary", x.numel(), make)


def _loss(values: int) -> _Case:
    """Throughput in multiplications with the output layer's weights, the most of its work."""
    rows, width = 127, 192
    vocabulary = values // width + 1
    hidden, weight = _random(rows, width), _random(vocabulary, width, seed=1) * 0.125
    targets = torch.arange(rows) * 31 % vocabulary

    def make(dtype: torch.dtype) -> Call:
        arguments = hidden.to(dtype), weight.to(dtype)
        return lambda: ops.linear_cross_entropy(*arguments, None, targets)[:2]

    return _Case("linear_cross_entropy", rows * weight.numel(), make)


def _adamw(values: int) -> _Case:
    n = values + 37

    def make(_: torch.dtype) -> Call:
        parameter, grad, m, v = _random(n), _random(n, seed=1), _random(n, seed=2) * 0.1, _random(n, seed=3).square()

        def call() -> tuple[Tensor, ...]:
            ops.adamw_step([parameter], [grad], [m], [v], 1e-3, 0.9, 0.999, 1e-8, 0.01, 10)
            return parameter, m, v

        return call

    return _Case("adamw_step", n, make)


def _decode(values: int) -> _Case:
    """A layer and an output layer, after seven tokens; throughput in weights."""
    hidden, heads, kv_heads, head_dim = 193, 4, 2, 24
    intermediate = values // (3 * hidden) + 1
    queries, cached = heads * head_dim, kv_heads * head_dim
    nf4 = torch.tensor(CODEBOOKS["nf4"])

    def linear(out: int, into: int) -> ops.DecodeLinear:
        with ops.forced_implementation(REFERENCE):
            packed, absmax = ops.quantize_4bit(_random(out, into, seed=out) * into**-0.5, nf4, 64)
        return ops.DecodeLinear(packed, absmax, None, nf4, 64, (out, into), None, None)

    norm = torch.ones(hidden)
    attention = linear(queries, hidden), linear(cached, hidden), linear(cached, hidden), linear(hidden, queries)
    mlp = linear(intermediate, hidden), linear(intermediate, hidden), linear(hidden, intermediate)
    layer = ops.DecodeLayer(norm, norm, *attention, *mlp)
    embedding = _random(577, hidden).bfloat16()
    scale = float(head_dim) ** -0.5
    model = ops.DecodeModel((layer,), norm, embedding, embedding, heads, kv_heads, head_dim, 1e-5, scale)
    cache, angle = _random(2, 1, kv_heads, 8, head_dim), _random(head_dim // 2, seed=1).repeat(2)

    def make(dtype: torch.dtype) -> Call:
        keys, values = cache.to(dtype)
        return lambda: (ops.decode_token(model, 3, angle.cos(), angle.sin(), keys, values, 7),)

    return _Case("decode_token", 3 * hidden * intermediate, make)


def _adamw_8bit(values: int) -> _Case:
    n = values + 37
    codebooks = torch.tensor(DYNAMIC_SIGNED), torch.tensor(DYNAMIC_UNSIGNED)
    with ops.forced_implementation(REFERENCE):
        encoded = [
            ops.quantize_8bit(moment, codebook, OPTIMIZER_BLOCK_SIZE)
            for moment, codebook in zip((_random(n, seed=2) * 0.1, _random(n, seed=3).square()), codebooks, strict=True)
        ]

    def make(_: torch.dtype) -> Call:
        parameter, grad = _random(n), _random(n, seed=1)
        moments = [tensor.clone() for pair in encoded for tensor in pair]

        def call() -> tuple[Tensor, ...]:
            m, m_absmax, v, v_absmax = ([moment] for moment in moments)
            ops.adamw_8bit_step([parameter], [grad], m, m_absmax, v, v_absmax, 1e-3, 0.9, 0.999, 1e-8, 0.01, 10)
            return parameter, moments[1], moments[3]

        return call

    return _Case("adamw_8bit_step", n, make)
