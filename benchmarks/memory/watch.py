"""The memory of another process while it runs, read from /proc.

anonymous   RssAnon: memory that belongs to no file. It cannot leave without swap; sampled, so that a peak shorter
            than the interval can be missed
pages       RssFile + RssShmem: mapped files that are in memory, libraries, weights and paged state; the system
            takes them away when it needs room; sampled
resident    VmHWM: the most of both together, kept by the system itself
"""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.005


@dataclass(frozen=True)
class Watched:
    returncode: int
    output: str
    seconds: float
    anonymous_bytes: int
    pages_bytes: int
    resident_bytes: int


def watch(command: Sequence[str], log: Path, environment: dict[str, str], limit_seconds: float) -> Watched:
    """Run a command, its output in `log`, and keep the most that it held; one that takes too long is ended."""
    began = time.monotonic()
    most = {"anonymous": 0, "pages": 0, "VmHWM": 0}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            sizes = _status(process.pid)
            sizes["anonymous"] = sizes.get("RssAnon", 0)
            sizes["pages"] = sizes.get("RssFile", 0) + sizes.get("RssShmem", 0)
            most = {key: max(size, sizes.get(key, 0)) for key, size in most.items()}
            if time.monotonic() - began > limit_seconds:
                process.kill()
            time.sleep(INTERVAL_SECONDS)
    seconds = time.monotonic() - began
    text = log.read_text(encoding="utf-8", errors="replace")
    return Watched(process.returncode, text, seconds, most["anonymous"], most["pages"], most["VmHWM"])


def _status(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status; empty for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
