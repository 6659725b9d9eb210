"""What halfbyte sees of this machine, and whether every kernel it could use computes what its oracle does."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from halfbyte.formats import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCK_SIZE
from halfbyte.ops import (
    active_implementation,
    available_implementations,
    dequantize_4bit,
    dequantize_8bit,
    forced_implementation,
    quantize_4bit,
    quantize_8bit,
)

REFERENCE = "reference"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "gguf", "numpy", "nanobind")
OPTIONAL_PACKAGES = {"bitsandbytes": "4-bit kernels on NVIDIA GPUs", "wandb": "a tracker", "mlflow": "a tracker"}

# Not a multiple of any vector or block, so that every loop's tail is run; 8 MB of float32, more than most caches.
VALUES = 2**21 + 37
SECONDS_A_CHECK = 0.1  # of repetitions, after one that is not counted


@dataclass(frozen=True)
class ImplementationState:
    """A row of the dispatch table."""

    name: str
    available: bool
    needs: str
    chosen: bool


@dataclass(frozen=True)
class OpCheck:
    """One op in one implementation, against its reference."""

    op: str
    implementation: str
    passed: bool
    detail: str
    seconds: float  # of the fastest call
    values_per_second: float


@dataclass(frozen=True)
class DoctorReport:
    cpu: str
    architecture: str
    logical_cores: int
    memory_bytes: int
    available_memory_bytes: int
    torch_threads: int
    openmp_libraries: list[str]  # each further copy is a thread pool that fights the first for the cores
    implementations: list[ImplementationState]
    choice: str  # why the chosen implementation is the chosen one
    packages: dict[str, str | None]
    optional_packages: dict[str, str | None]
    cuda: str
    checks: list[OpCheck]

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}


def examine() -> DoctorReport:
    """Look at the machine and run the self-test; a few seconds.

    Raises:
        HalfbyteError: `HALFBYTE_IMPLEMENTATION` names what cannot run here.
    """
    chosen, choice = active_implementation()
    table = [
        ImplementationState(row.name, row.available, row.needs, row.name == chosen)
        for row in available_implementations()
    ]
    memory = psutil.virtual_memory()
    return DoctorReport(
        cpu=_cpu_model(),
        architecture=platform.machine(),
        logical_cores=os.cpu_count() or 1,
        memory_bytes=memory.total,
        available_memory_bytes=memory.available,
        torch_threads=torch.get_num_threads(),
        openmp_libraries=_openmp_libraries(),
        implementations=table,
        choice=choice,
        packages={"python": platform.python_version(), **{name: _version(name) for name in ("halfbyte", *PACKAGES)}},
        optional_packages={name: _version(name) for name in OPTIONAL_PACKAGES},
        cuda=_cuda(),
        checks=self_test([row.name for row in table if row.available and row.name != "bitsandbytes"]),
    )


def self_test(implementations: list[str]) -> list[OpCheck]:
    """Every op in every implementation named, on the CPU, on a tensor with a block of zeros, outliers and a tail."""
    with forced_implementation(REFERENCE):
        calls = _calls()
        expected = {op: call() for op, call in calls.items()}
    checks = []
    for op, call in calls.items():
        for name in implementations:
            with forced_implementation(name):
                passed, detail = _compare(call(), expected[op])
                seconds = _fastest(call)
            if name == REFERENCE:
                detail = "the oracle itself"
            checks.append(OpCheck(op, name, passed, detail, seconds, VALUES / seconds))
    return checks


def _calls() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    values = torch.randn(VALUES, generator=torch.Generator().manual_seed(0))
    values[64:128] = 0.0
    values[::4099] *= 50.0
    codebook = torch.tensor(CODEBOOKS["nf4"])
    signed = torch.tensor(DYNAMIC_SIGNED)
    packed, absmax = quantize_4bit(values, codebook, 64)
    codes, nested_absmax = quantize_8bit(values, signed, NESTED_BLOCK_SIZE)
    shape, dtype = [VALUES], torch.bfloat16
    return {
        "quantize_4bit": lambda: quantize_4bit(values, codebook, 64),
        "dequantize_4bit": lambda: (dequantize_4bit(packed, absmax, codebook, 64, shape, dtype),),
        "quantize_8bit": lambda: quantize_8bit(values, signed, NESTED_BLOCK_SIZE),
        "dequantize_8bit": lambda: (dequantize_8bit(codes, nested_absmax, signed, NESTED_BLOCK_SIZE),),
    }


def _compare(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[bool, str]:
    for ours, oracle in zip(got, expected, strict=True):
        wrong = int((ours.view(torch.uint8) != oracle.view(torch.uint8)).sum())
        if wrong:
            return False, f"{wrong:,} of {oracle.nbytes:,} bytes differ from the reference"
    return True, "equal to the reference, byte for byte"


def _fastest(call: Callable[[], object]) -> float:
    best = float("inf")
    end = time.perf_counter() + SECONDS_A_CHECK
    while (started := time.perf_counter()) < end or best == float("inf"):
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _openmp_libraries() -> list[str]:
    """The OpenMP runtimes that this process has loaded, by path; only Linux tells."""
    if not sys.platform.startswith("linux"):
        return []
    paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device; halfbyte works on the CPU"
    return f"{torch.cuda.get_device_name()}: halfbyte's CUDA path is written, not yet run"
