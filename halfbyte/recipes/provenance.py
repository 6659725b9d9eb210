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
from halfbyte.data import Source, is_local, source_files
from halfbyte.ops import active_implementation
from halfbyte.recipes.data_sources import held_out_sources, training_sources

_PACKAGES = ("halfbyte", "torch", "transformers", "peft", "safetensors", "tokenizers")


def write_run_file(
    directory: Path,
    config: FinetuneConfig,
    base_sha256: str,
    recomputation: dict[str, Any],
    result: dict[str, Any] | None,
) -> None:
    """Write `run.json`; `result` is there once the run is done."""
    said = {"dataset": training_sources(config), "eval_dataset": held_out_sources(config)}
    data = {name: [_told(source) for source in sources] for name, sources in said.items() if sources}
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


def _told(source: Source) -> dict[str, Any]:
    """What a set of data was called, and the SHA-256 of each file it was read from; a hub id has none."""
    files = source_files(source) if is_local(source.path) else []
    return {
        "path": source.path,
        "split": source.split,
        "sha256": {str(file): file_sha256(file) for file in files},
    }


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had."""
    try:  # not ru_maxrss where it can be helped: a child inherits its parent's
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
