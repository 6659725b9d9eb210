"""Writing that survives a kill: aside first, then renamed, so a name holds the old bytes or the new, never half."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = ".writing"  # the suffix of what is not finished


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON of `value`, at once."""
    aside = path.with_name(path.name + WRITING)
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def directory_written_aside(directory: Path) -> Iterator[Path]:
    """A new directory that gets its name when the block ends well, and is gone when it does not."""
    aside = directory.with_name(directory.name + WRITING)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        if directory.exists():
            shutil.rmtree(directory)
        aside.rename(directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
