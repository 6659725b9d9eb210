"""The output directory of a run: whose it is, and whether it may be written."""

import json
import shutil
import tempfile
from pathlib import Path

from halfbyte.errors import HalfbyteError

RUN_FILE = "run.json"


def check_output_dir(directory: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a directory that a run may not be written to; nothing in it is changed.

    Raises:
        HalfbyteError: it is a file, is not writable, holds something else than a run of ours, or holds a
            run and neither `resume` nor `overwrite` is asked for.
    """
    if directory.exists() and not directory.is_dir():
        raise HalfbyteError(f"output_dir {directory} is a file; name a directory.")
    if directory.is_dir() and any(directory.iterdir()):
        if not is_run(directory):
            raise HalfbyteError(
                f"output_dir {directory} holds something else than a run of halfbyte's; name a new directory."
            )
        if not (resume or overwrite):
            raise HalfbyteError(
                f"output_dir {directory} holds a run already; name another, continue it with"
                " --resume_from_checkpoint true, or replace it with --overwrite_output_dir true."
            )
    elif resume:
        raise HalfbyteError(f"output_dir {directory} holds no run to resume; leave resume_from_checkpoint out.")
    check_writable(directory, "output_dir")


def is_run(directory: Path) -> bool:
    """Whether the directory was written by a run of ours."""
    try:
        return "halfbyte" in json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def clear_run(directory: Path) -> None:
    """Remove an earlier run; only what `check_output_dir` let through comes here."""
    if is_run(directory):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path, key: str) -> None:
    """Raises HalfbyteError, naming the configuration's `key`, if a file or directory cannot be made at `path`."""
    parents = path.absolute().parents
    existing = next(place for place in (parents if path.is_file() else (path, *parents)) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise HalfbyteError(f"{key} {path} cannot be written ({error.strerror}); name another.") from error
