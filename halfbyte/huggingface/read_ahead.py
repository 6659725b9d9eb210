"""The disk at work while a tensor is: what follows it in its file is asked for before it is wanted.

Only asked for: the system reads it into its own cache, and the process holds none of it.
"""

import os
from pathlib import Path

from halfbyte.huggingface.safetensors_files import large_places, safetensors_files

_AHEAD_BYTES = 256 << 20
_REQUEST_BYTES = 16 << 20


class ReadAhead:
    """Keeps some of a directory's safetensors ahead of a reader that goes through them about in their order."""

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, tuple[Path, int]] = {}  # name -> file, the byte after it
        self._asked: dict[Path, int] = {}  # up to which byte
        if not hasattr(os, "posix_fadvise"):
            return  # macOS has no such request
        for file in safetensors_files(directory):
            for name, place in large_places(file):
                self._places[name] = file, place.offset + place.nbytes

    def reached(self, name: str) -> None:
        """A tensor is about to be read: ask for what follows it."""
        if name not in self._places:
            return
        file, end = self._places[name]
        begin = max(end, self._asked.get(file, 0))
        if end + _AHEAD_BYTES - begin < _REQUEST_BYTES:
            return
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, begin, end + _AHEAD_BYTES - begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
        self._asked[file] = end + _AHEAD_BYTES
