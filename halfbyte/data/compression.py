"""The bytes of a file, a piece at a time, decompressed where its name ends in .gz or .zst."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from halfbyte.data.records import LONGEST_RECORD_BYTES
from halfbyte.errors import HalfbyteError

COMPRESSIONS = (".gz", ".zst")
_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # editors on Windows write it


def read_chunks(path: Path) -> Iterator[bytes]:
    """The file in pieces of at most 1 MiB, without a byte order mark.

    Raises HalfbyteError where it cannot be opened or read; in a compressed file with the line so far.
    """
    line = 1
    try:
        with _open(path) as stream:
            start = stream.read(_CHUNK_BYTES).removeprefix(_BYTE_ORDER_MARK)
            while start:
                yield start
                line += start.count(b"\n")
                start = stream.read(_CHUNK_BYTES)
    except FileNotFoundError:
        raise HalfbyteError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        # ValueError: a NUL character in the path. An error of the file system has a number, of the format has none.
        if isinstance(error, ValueError) or getattr(error, "errno", None) is not None:
            raise HalfbyteError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        raise HalfbyteError(
            f"{path}:{line}: cannot be decompressed ({error}): the file is cut off, damaged or not what its name says"
        ) from None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        path.open("rb").close()  # the system's own words for a file that cannot be opened
        return cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def read_lines(path: Path) -> Iterator[bytes]:
    """The file's lines, each with its line break. Cut at "\\n" alone: JSON allows U+2028 and U+0085 inside a string.

    Raises HalfbyteError, with file and line, for a line of more than LONGEST_RECORD_BYTES.
    """
    pending: list[bytes] = []  # a line that goes on in the next chunk
    pending_bytes, number = 0, 1
    for chunk in read_chunks(path):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            if pending:
                line = b"".join(pending) + line
                pending, pending_bytes = [], 0
            yield line + b"\n"
            number += 1
        if rest:
            pending.append(rest)
            pending_bytes += len(rest)
            if pending_bytes > LONGEST_RECORD_BYTES:
                raise HalfbyteError(f"{path}:{number}: a line of more than {LONGEST_RECORD_BYTES >> 20} MiB is no row")
    if pending:
        yield b"".join(pending)
