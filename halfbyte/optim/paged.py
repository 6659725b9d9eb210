"""Where an optimizer's state lives when memory may run short: in a file.  QLoRA (arXiv 2305.14314), section 3.

A `PageFile` keeps the state of a group of parameters in a file without a name, in the order in which a step touches it,
and maps it into memory. While there is room its pages stay there, and a step takes as long as without a file. When
memory runs short the system writes them out and takes them away, and brings them back, reading ahead, when the next
step comes to them. Memory without a file behind it can leave for swap only, which many machines have none of. The
system is given no hints: docs/decisions/0014 has what they cost.

The file is unlinked from the start: whatever ends the process, nothing is left of it. Its blocks are allocated at once,
so that a full disk is an error at the start and not a SIGBUS in the midst of a step.
"""

import itertools
import mmap
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError

_ALIGNMENT = 64  # bytes at a multiple of which every tensor begins


def check_page_dir(directory: Path) -> None:
    """Raises HalfbyteError if a file cannot be made in the directory."""
    if not directory.is_dir():
        raise HalfbyteError(f"page_dir {directory} is not a directory; make it, or name another.")
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise HalfbyteError(f"page_dir {directory} cannot be written ({error.strerror}); name another.") from error


def is_in_memory(directory: Path) -> bool:
    """Whether the directory's files are themselves kept in memory, as in many a /tmp: state paged to it stays there."""
    device = directory.stat().st_dev
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    # 36 25 0:31 / /tmp rw,nosuid shared:15 - tmpfs tmpfs rw
    named = f"{os.major(device)}:{os.minor(device)}"
    return any(
        line.split()[2] == named and line.partition(" - ")[2].split()[0] in ("tmpfs", "ramfs") for line in mounts
    )


class PageFile:
    """Tensors of zeros in an unlinked file.

    Raises:
        HalfbyteError: the directory cannot be written, or has too little room.
    """

    def __init__(
        self, directory: Path, layouts: Sequence[dict[str, Tensor]], what: str = "the optimizer's state"
    ) -> None:
        """`layouts`: for each parameter, name -> a tensor of the shape and dtype wanted; its values do not matter."""
        check_page_dir(directory)
        if is_in_memory(directory):
            warnings.warn(
                f"page_dir {directory} is kept in memory itself, so paging to it frees none;"
                " name a directory on a disk.",
                stacklevel=2,
            )
        sizes = [sum(_aligned(like.nbytes) for like in layout.values()) for layout in layouts]
        self.nbytes = max(sum(sizes), mmap.PAGESIZE)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed with this object, by the next line)
        weakref.finalize(self, self._file.close)
        _allocate(self._file.fileno(), self.nbytes, directory, what)
        self._map = mmap.mmap(self._file.fileno(), self.nbytes)
        starts = itertools.accumulate(sizes[:-1], initial=0)
        self.tensors = [self._carve(start, layout) for start, layout in zip(starts, layouts, strict=True)]

    def _carve(self, start: int, layout: dict[str, Tensor]) -> dict[str, Tensor]:
        carved = {}
        for name, like in layout.items():
            if like.numel():
                flat = torch.frombuffer(self._map, dtype=like.dtype, count=like.numel(), offset=start)
                carved[name] = flat.view(like.shape)
            else:
                carved[name] = torch.zeros_like(like, device="cpu")
            start += _aligned(like.nbytes)
        return carved

    def evict(self) -> None:
        """Write everything to the file and give its memory back at once, as the system does when it needs it."""
        self._map.flush()
        self._map.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _allocate(descriptor: int, nbytes: int, directory: Path, what: str) -> None:
    free = shutil.disk_usage(directory).free
    reason = "No space left on device"
    if nbytes <= free:
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            reason = error.strerror or reason
    raise HalfbyteError(
        f"page_dir {directory} cannot hold {what} ({reason}): it needs {nbytes:,} bytes, and"
        f" {free:,} are free; make room there or name another."
    )
