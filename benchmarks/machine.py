"""The machine and the versions that a run's figures belong to, and the machine's own peaks."""

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.options import ROOT, Options

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
_OURS = ("halfbyte", "torch", "transformers", "peft")
_PEERS = ("bitsandbytes", "torch", "transformers", "peft", "trl", "accelerate")


def describe(options: Options) -> dict[str, Any]:
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or "unknown",
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in _flags()],
        "cores": os.cpu_count(),
        "threads": options.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(options.halfbyte_python, _OURS),
        "peer_versions": _versions(options.peers_python, _PEERS),
        "peaks": measure_peaks(options),
    }


def measure_peaks(options: Options) -> dict[str, float | None]:
    """Arithmetic in registers alone, and memory bandwidth."""
    answer = subprocess.run([peak_binary(options), str(options.threads)], check=True, capture_output=True, text=True)
    peaks: dict[str, float | None] = json.loads(answer.stdout)
    return peaks


def peak_binary(options: Options) -> Path:
    """benchmarks/peak.cpp, compiled if that was not done yet."""
    source, binary = ROOT / "benchmarks/peak.cpp", options.directory / "peak"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        options.directory.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or "c++"
        subprocess.run([compiler, "-std=c++20", "-O3", "-pthread", "-o", binary, source], check=True)
    return binary


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    try:
        short = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "halfbyte", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{short} with uncommitted changes" if changed else short


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    answer = subprocess.run([python, "-c", script, *packages], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())
