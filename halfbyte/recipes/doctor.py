"""What halfbyte sees of this machine, and whether every kernel it could use computes what its oracle does."""

import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte.ops import active_implementation, available_implementations
from halfbyte.recipes.self_test import OpCheck, self_test

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "gguf", "numpy", "nanobind")
OPTIONAL_PACKAGES = {"bitsandbytes": "4-bit kernels on NVIDIA GPUs", "wandb": "a tracker", "mlflow": "a tracker"}


@dataclass(frozen=True)
class ImplementationState:
    """A row of the dispatch table."""

    name: str
    available: bool
    needs: str
    chosen: bool


@dataclass(frozen=True)
class DoctorReport:
    cpu: str
    architecture: str
    logical_cores: int
    load_average: float  # processes that ran or wanted to, over the last minute, before the self-test
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
        load_average=psutil.getloadavg()[0],
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
