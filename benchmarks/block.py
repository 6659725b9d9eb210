"""The operations of a block against torch, forward and backward, alternated in one run.

    python benchmarks/block.py [--threads N] [--seconds 2]

torch's side is what transformers runs: the modules of a Llama, a Gemma and a GPT-NeoX as they are written there, the
loss from all logits at once, AdamW as torch's own for-loop and its fused kernel. The weights are frozen, as in QLoRA.
A row's figures are the medians of calls made in turn, so that whatever else the machine does falls on both alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from halfbyte.nn import gated, layer_norm, linear_cross_entropy, rms_norm, rotate_queries_and_keys
from halfbyte.optim import AdamW

Call = Callable[[], object]


def there_and_back(function: Callable[..., Tensor | tuple[Tensor, ...]], *shapes: tuple[int, ...]) -> Call:
    """A call of `function` on bfloat16 leaves, and the gradients to all of them."""
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) for output in outputs]

    def call() -> object:
        out = function(*leaves)
        return torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, grads)

    return call


def only_there(function: Callable[..., object], *shapes: tuple[int, ...]) -> Call:
    values = [torch.randn(shape).bfloat16() for shape in shapes]

    def call() -> object:
        with torch.no_grad():
            return function(*values)

    return call


def split_heads(x: Tensor) -> Tensor:
    """As attention has them: views of a projection's output, (batch, length, heads, head_dim) underneath."""
    return x.transpose(1, 2)


def rotate_by_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = split_heads(q), split_heads(k), cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def pairs(n: int, width: int, inner: int, heads: int, kv_heads: int) -> list[tuple[str, Call, Call]]:
    """(what, ours, theirs) for `n` positions of a model of this size."""
    llama, gemma = (kind(width, 1e-5).bfloat16().requires_grad_(False) for kind in (LlamaRMSNorm, Gemma2RMSNorm))
    weight, bias = torch.rand(2, width).bfloat16()
    angles = torch.rand(1, n, 32).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    q_shape, k_shape = (1, n, heads, 64), (1, n, kv_heads, 64)

    rows: list[tuple[str, Callable[..., object], Callable[..., object], list[tuple[int, ...]]]] = [
        ("rms_norm (Llama)", lambda x: rms_norm(x, llama.weight, 1e-5), llama, [(n, width)]),
        ("rms_norm (Gemma)", lambda x: rms_norm(x, gemma.weight, 1e-5, 1.0), gemma, [(n, width)]),
        (
            "layer_norm",
            lambda x: layer_norm(x, weight, bias, 1e-5),
            lambda x: F.layer_norm(x, (width,), weight, bias, 1e-5),
            [(n, width)],
        ),
        (
            "rotary",
            lambda q, k: rotate_queries_and_keys(split_heads(q), split_heads(k), cos, sin),
            lambda q, k: rotate_by_torch(q, k, cos, sin),
            [q_shape, k_shape],
        ),
        ("gated (SiLU)", lambda g, u: gated(g, u, "silu"), lambda g, u: F.silu(g) * u, [(n, inner)] * 2),
        (
            "gated (GELU, tanh)",
            lambda g, u: gated(g, u, "gelu_tanh"),
            lambda g, u: F.gelu(g, approximate="tanh") * u,
            [(n, inner)] * 2,
        ),
    ]
    out: list[tuple[str, Call, Call]] = []
    for name, ours, theirs, shapes in rows:
        out.append((f"{name} {n}×{shapes[0][-1]} forward", only_there(ours, *shapes), only_there(theirs, *shapes)))
        both = [there_and_back(function, *shapes) for function in (ours, theirs)]  # type: ignore[arg-type]
        out.append((f"{name} {n}×{shapes[0][-1]} forward + backward", both[0], both[1]))
    return out


def loss_pair(n: int, width: int, vocabulary: int) -> tuple[str, Call, Call]:
    hidden, weight = torch.randn(n, width).bfloat16(), (torch.randn(vocabulary, width) * width**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (n,))

    def ours() -> object:
        leaf = hidden.clone().requires_grad_()
        return torch.autograd.grad(linear_cross_entropy(leaf, weight, None, targets), leaf)

    def theirs() -> object:
        leaf = hidden.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(F.linear(leaf, weight).float(), targets, reduction="sum"), leaf)

    return f"loss {n}×{width}, vocabulary {vocabulary:,}, forward + backward", ours, theirs


def optimizer_pairs() -> list[tuple[str, Call, Call]]:
    """The adapters of SmolLM2-135M at rank 16, 360 tensors of 4.9 million values."""
    shapes = [(16, 576), (576, 16), (16, 576), (192, 16), (16, 576), (192, 16), (16, 576), (576, 16)]
    shapes += [(16, 576), (1536, 16)] * 2 + [(16, 1536), (576, 16)]
    steps = []
    for kind, settings in ((AdamW, {}), (torch.optim.AdamW, {"foreach": False}), (torch.optim.AdamW, {"fused": True})):
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes * 30]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        steps.append(kind(parameters, lr=1e-4, **settings).step)  # type: ignore[operator]
    return [("AdamW, for-loop", steps[0], steps[1]), ("AdamW, fused", steps[0], steps[2])]


def compare(ours: Call, theirs: Call, seconds: float) -> tuple[float, float]:
    """Median seconds of each."""
    times: list[list[float]] = [[], []]
    for call in (ours, theirs):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 5:
        for row, call in zip(times, (ours, theirs), strict=True):
            started = time.perf_counter()
            call()
            row.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    everything = [
        loss_pair(2048, 576, 49152),
        loss_pair(256, 4096, 32000),
        *pairs(2048, 576, 1536, 9, 3),
        *pairs(512, 4096, 11008, 32, 8),
        *optimizer_pairs(),
    ]
    print(f"{options.threads} threads, bfloat16, milliseconds\n")
    print("| what | halfbyte | torch | times |\n| --- | --- | --- | --- |")
    for name, ours, theirs in everything:
        mine, other = compare(ours, theirs, options.seconds)
        print(f"| {name} | {mine * 1e3:.2f} | {other * 1e3:.2f} | {other / mine:.1f} |", flush=True)


if __name__ == "__main__":
    main()
