"""run.json: what a run was told, with which versions, from which base and which data."""

import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.files import write_json
from halfbyte.checkpoint.fingerprint import file_sha256
from halfbyte.checkpoint.output import RUN_FILE
from halfbyte.config import FinetuneConfig
from halfbyte.ops import active_implementation

_PACKAGES = ("halfbyte", "torch", "transformers", "peft", "safetensors", "tokenizers")


def write_run_file(
    directory: Path,
    config: FinetuneConfig,
    base_sha256: str,
    recomputation: dict[str, Any],
    result: dict[str, Any] | None,
) -> None:
    """Write `run.json`; `result` is there once the run is done."""
    data = {
        name: {"path": path, "sha256": file_sha256(Path(path))}
        for name in ("dataset", "eval_dataset")
        if (path := getattr(config, name)) is not None
    }
    write_json(
        directory / RUN_FILE,
        {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "machine": {"processor": platform.machine(), "kernels": active_implementation()},
            "base_model": {"name_or_path": config.model_name_or_path, "weights_sha256": base_sha256},
            "data": data,
            "config": config.to_dict(),
            "recomputation": recomputation,
            "result": result,
        },
    )


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had."""
    try:  # not ru_maxrss where it can be helped: a child inherits its parent's
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
