"""Writing that survives a kill: aside first, then renamed, so a name holds the old bytes or the new, never half."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = ".writing"  # the suffix of what is not finished
REPLACED = ".replaced"  # and of what is in the way of what is


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON of `value`, at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a text, at once."""
    aside = path.with_name(path.name + WRITING)
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
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
        replaced = directory.with_name(directory.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        if directory.exists():
            directory.rename(replaced)  # removed only when the new one has the name
        aside.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_written_aside(path: Path) -> Iterator[Path]:
    """The name of a file to be written, which gets its own name when the block ends well, and is gone when not."""
    aside = path.with_name(path.name + WRITING)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        _sync(aside)
        aside.rename(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
