"""Causal attention against torch's scaled_dot_product_attention, forward and backward, alternated in one run.

    python benchmarks/attention.py [--threads N] [--seconds 2]

A row's figures are the medians of calls made in turn, so that whatever else the machine does falls on both alike; the
smallest are given beside them. The keys of grouped queries are repeated for torch before the clock starts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte import ops

SHAPES = [  # batch, heads, kv_heads, length, head_dim
    (4, 9, 3, 512, 64),
    (1, 9, 3, 512, 64),
    (1, 32, 8, 2048, 64),
    (1, 32, 8, 512, 128),
    (2, 8, 4, 1024, 256),
    (8, 9, 3, 128, 64),
]


def alternate(ours: Callable[[], object], theirs: Callable[[], object], seconds: float) -> list[list[float]]:
    times: list[list[float]] = [[], []]
    for call in (ours, theirs):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 5:
        for row, call in zip(times, (ours, theirs), strict=True):
            started = time.perf_counter()
            call()
            row.append(time.perf_counter() - started)
    return times


def measure(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, seconds: float
) -> None:
    def rows(count: int) -> Tensor:
        return torch.randn(batch, length, count, head_dim).to(dtype).transpose(1, 2)

    q, k, v, dout = rows(heads), rows(kv_heads), rows(kv_heads), rows(heads)
    scale = head_dim**-0.5
    out, logsumexp = ops.attention(q, k, v, None, scale, 0, 0.0)
    tall = [x.repeat_interleave(heads // kv_heads, dim=1).requires_grad_() for x in (k, v)]
    q_leaf = q.detach().requires_grad_()
    theirs = F.scaled_dot_product_attention(q_leaf, *tall, is_causal=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, *tall, is_causal=True)

    pairs = (
        ("forward", 2, lambda: ops.attention(q, k, v, None, scale, 0, 0.0), forward),
        (
            "backward",
            5,
            lambda: ops.attention_backward(dout, q, k, v, out, logsumexp, None, scale, 0, 0.0),
            lambda: torch.autograd.grad(theirs, (q_leaf, *tall), dout, retain_graph=True),
        ),
    )
    name = f"{batch}×{heads}({kv_heads})×{length}×{head_dim} {str(dtype).removeprefix('torch.')}"
    for label, products, ours, other in pairs:
        times = alternate(ours, other, seconds)
        (mine, best), (yours, their_best) = ((statistics.median(t) * 1e3, min(t) * 1e3) for t in times)
        gigaflops = products * batch * heads * length * (length + 1) * head_dim / (best * 1e6)
        print(
            f"{name:30} {label:9} {mine:8.2f} {best:8.2f} {gigaflops:7.0f}   {yours:8.2f} {their_best:8.2f}"
            f"   {yours / mine:5.1f}×  {their_best / best:5.1f}×"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="a figure")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    implementation = ops.active_implementation("attention")[0]
    print(f"{implementation}, {arguments.threads} threads, torch {torch.__version__}; milliseconds")
    print(f"{'':40} {'median':>8} {'best':>8} {'GF/s':>7}   {'torch':>8} {'best':>8}   {'median':>6}  {'best':>6}")
    for shape in SHAPES:
        measure(*shape, getattr(torch, arguments.dtype), arguments.seconds)


if __name__ == "__main__":
    main()
