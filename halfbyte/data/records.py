"""What a file's reader hands on: a value, the place it was read from, or what is wrong with that place."""

from typing import Any, NamedTuple

from halfbyte.errors import HalfbyteError

# No row of text is as long as this; what is, is a file of another kind, or one whose quotes or brackets never close.
LONGEST_RECORD_BYTES = 64 << 20


class Record(NamedTuple):
    """One value of a file.

    An `error` is about this value alone: the reader knows where the next one begins and goes on, so whoever reads the
    records decides whether it stops them. What nobody could go on from is raised instead.
    """

    value: Any  # of whatever type the file holds; None beside an error
    source: str
    error: HalfbyteError | None = None


def bad_record(source: str, sentence: str) -> Record:
    return Record(None, source, HalfbyteError(f"{source}: {sentence}"))
