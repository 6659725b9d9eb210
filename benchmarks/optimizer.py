"""A step of AdamW in each way of keeping its state, all in turn in one run: milliseconds, and bytes of state.

    python -m benchmarks.optimizer [--threads N] [--rounds 9] [--values 64] [--page_dir DIRECTORY]

Two loads: the adapters of SmolLM2-135M at rank 16 (360 tensors, 4.9 million values), and four tensors of --values
million values together, which no cache holds. Beside ours stand torch's fused AdamW and, where the interpreter has
bitsandbytes, its AdamW8bit. "evicted" is a paged step after all state was written out and dropped from memory.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from halfbyte.optim import AdamW

SMOLLM2 = [(16, 576), (576, 16), (16, 576), (192, 16), (16, 576), (192, 16), (16, 576), (576, 16)]
SMOLLM2 += [(16, 576), (1536, 16)] * 2 + [(16, 1536), (576, 16)]


def parameters_of(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def optimizers(page_dir: str) -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    known: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "adamw": lambda p: AdamW(p, lr=1e-4),
        "torch, fused": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0, fused=True),
        "adamw_8bit": lambda p: AdamW(p, lr=1e-4, state_bits=8),
        "paged_adamw_32bit": lambda p: AdamW(p, lr=1e-4, paged=True, page_dir=page_dir),
        "paged_adamw_8bit": lambda p: AdamW(p, lr=1e-4, state_bits=8, paged=True, page_dir=page_dir),
        "paged_adamw_32bit, evicted": lambda p: AdamW(p, lr=1e-4, paged=True, page_dir=page_dir),
        "paged_adamw_8bit, evicted": lambda p: AdamW(p, lr=1e-4, state_bits=8, paged=True, page_dir=page_dir),
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        known["bitsandbytes, AdamW8bit"] = lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-4, weight_decay=0.0)
    return known


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    own = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 1]
    return sum({t.data_ptr(): t.nbytes for t in own}.values())  # bitsandbytes' maps are one tensor for all


def measure(shapes: list[tuple[int, ...]], rounds: int, page_dir: str) -> None:
    steppers = {name: make(parameters_of(shapes)) for name, make in optimizers(page_dir).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for round_number in range(rounds + 2):
        for name, optimizer in steppers.items():
            if name.endswith("evicted") and round_number:
                optimizer.evict()  # type: ignore[attr-defined]
            started = time.perf_counter()
            optimizer.step()
            if round_number > 1:
                seconds[name].append(time.perf_counter() - started)
    print("| state | bytes of state | step, ms: median | least |\n| --- | --- | --- | --- |")
    for name, times in seconds.items():
        figures = f"{statistics.median(times) * 1e3:.1f} | {min(times) * 1e3:.1f}"
        print(f"| {name} | {state_bytes(steppers[name]):,} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--values", type=int, default=64, help="millions, of the second load")
    parser.add_argument("--page_dir", default=tempfile.gettempdir())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} threads, {options.rounds} rounds in turn\n\nadapters of SmolLM2-135M, rank 16\n")
    measure(SMOLLM2 * 30, options.rounds, options.page_dir)
    print(f"\nfour tensors, {options.values} million values\n")
    measure([(options.values * 2**18,)] * 4, options.rounds, options.page_dir)


if __name__ == "__main__":
    main()
