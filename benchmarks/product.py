"""The product with a 4-bit weight against torch's dense bf16 product, and against what the machine's registers can do.

    python benchmarks/product.py [--threads N] [--seconds 1] [--rows 256 512 2048] [--decode]

Forward is x · Wᵀ and backward dy · W, both with a low-rank term of rank 16 where the column says so; torch's weight is
dense already. Calls are made in turn, so that whatever else the machine does falls on all alike, and the fastest of
each counts. With one thread the clock is the thread's own processor time, which runs only while the thread does: on a
machine that is busy with other things, measure with `--threads 1`. The peak (benchmarks/peak.cpp) is measured before
and after, and the better one is the yardstick.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from halfbyte.quant import quantize_4bit

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1536, 576), (576, 1536), (192, 576)]  # (out, in)
SMOLLM2_135M = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]  # of 30 layers
RANK = 16


def fastest(calls: list[Callable[[], object]], seconds: float, clock: Callable[[], float]) -> list[float]:
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 3:
        rounds += 1
        for i, call in enumerate(calls):
            started, count = clock(), 0
            while (spent := clock() - started) < 1e-3 or count == 0:
                call()
                count += 1
            best[i] = min(best[i], spent / count)
    return best


def build_peak() -> Path:
    source = Path(__file__).with_name("peak.cpp")
    binary = Path(tempfile.mkdtemp()) / "peak"
    subprocess.run(["c++", "-std=c++20", "-O3", "-pthread", "-o", binary, source], check=True)
    return binary


def measure_peak(binary: Path, threads: int) -> float:
    """Of bf16, or float32 where the machine has no bf16 arithmetic, in operations a second."""
    answer = subprocess.run([binary, str(threads), "arithmetic"], check=True, capture_output=True, text=True)
    peaks: dict[str, float | None] = json.loads(answer.stdout)
    return max(value for name, value in peaks.items() if value and ("bf16" in name or "float32" in name))


def measure_decoding(seconds: float, clock: Callable[[], float]) -> str:
    """All products of SmolLM2-135M's 30 layers for one token, with weights of their own: 53 MB that no cache keeps."""
    layers = [quantize_4bit(torch.randn(shape) * 0.05) for _ in range(30) for shape in SMOLLM2_135M]
    inputs = {width: torch.randn(1, width).bfloat16() for width in (576, 1536)}

    def token() -> None:
        for layer in layers:
            layer.matmul(inputs[layer.shape[1]])

    (taken,) = fastest([token], seconds, clock)
    weights = sum(layer.shape.numel() for layer in layers)
    return f"{weights / 1e6:.0f} M weights a token: {taken * 1e3:.2f} ms, {weights / taken / 1e9:.1f} G weights/s"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 2048])
    parser.add_argument("--decode", action="store_true", help="the products of one token instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    if options.decode:
        print(measure_decoding(options.seconds, clock))
        return
    binary = build_peak()
    peak = measure_peak(binary, options.threads)
    rows: list[tuple[str, list[float]]] = []
    for out, into in SHAPES:
        quantized = quantize_4bit(torch.randn(out, into) * 0.05)
        dense = quantized.dequantize(torch.bfloat16)
        for count in options.rows:
            x, dy, t = (torch.randn(count, n).bfloat16() for n in (into, out, RANK))
            lora_A, lora_B = torch.randn(RANK, into).bfloat16(), torch.randn(out, RANK).bfloat16()
            calls: list[Callable[[], object]] = [
                lambda q=quantized, x=x: q.matmul(x),  # type: ignore[misc]
                lambda q=quantized, dy=dy: q.matmul(dy, True),  # type: ignore[misc]
                lambda q=quantized, x=x, low=(t, lora_B): q.matmul(x, False, low),  # type: ignore[misc]
                lambda q=quantized, dy=dy, low=(t, lora_A): q.matmul(dy, True, low),  # type: ignore[misc]
                lambda x=x, w=dense: x @ w.t(),  # type: ignore[misc]
                lambda dy=dy, w=dense: dy @ w,  # type: ignore[misc]
            ]
            flops = [2 * count * out * into] * 6
            for low in (2, 3):
                flops[low] += 2 * count * RANK * (out if low == 2 else into)
            seconds = fastest(calls, options.seconds, clock)
            rows.append((f"{out}×{into}, {count}", [n / s for n, s in zip(flops, seconds, strict=True)]))
    peak = max(peak, measure_peak(binary, options.threads))
    print(f"{options.threads} threads; peak {peak / 1e9:.0f} GF/s\n")
    print("| weight, rows | forward | backward | forward + rank 16 | backward + rank 16 | torch forward | backward |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rates in rows:
        print(f"| {name} | " + " | ".join(f"{rate / 1e9:.0f} ({rate / peak:.0%})" for rate in rates) + " |")


if __name__ == "__main__":
    main()
