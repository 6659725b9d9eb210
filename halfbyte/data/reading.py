"""From data sets to rows, one at a time: of each the format, and of several the mix."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from halfbyte.data.fields import kind
from halfbyte.data.formats import FORMATS, detect_format, read_record
from halfbyte.data.records import Record
from halfbyte.data.rows import Row, Source
from halfbyte.data.sources import open_source
from halfbyte.errors import HalfbyteError

OnBadRow = Callable[[HalfbyteError], None]


def read_rows(
    path: str | Path,
    dataset_format: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    on_bad_row: OnBadRow | None = None,
) -> Iterator[Row]:
    """The rows of a file, a directory or a hub id, in their order; a row is read when it is asked for.

    `dataset_format` is a name of `FORMATS`, or "auto", which goes by the keys of the first row. `columns` says where
    the format's keys go by other names in the data. `split` is "train", "test", "train[:5000]" or "[10%:20%]".

    Raises HalfbyteError, at the call for a source that is not there, while reading for what cannot be read, with the
    file and the line. A row that alone is wrong goes to `on_bad_row` where that is given, and reading goes on.
    """
    return read_sources([Source(str(path), None, split, dataset_format, columns)], on_bad_row=on_bad_row)


def read_sources(sources: Sequence[Source], *, on_bad_row: OnBadRow | None = None) -> Iterator[Row]:
    """The rows of several data sets: one set after the other, or mixed where they have weights.

    Of sets with weights 3 and 1 every four rows that follow one another hold three of the first and one of the second.
    The mix ends when every set has been read to its end; one that ends before begins again, so no row is left out, and
    those of a small set with a large weight come several times.

    Raises HalfbyteError as read_rows does, and where only some of the sets have a weight.
    """
    if not sources:
        raise HalfbyteError("dataset is an empty list: there is nothing to learn")
    for source in sources:
        if source.dataset_format not in ("auto", *FORMATS):
            raise HalfbyteError(
                f"dataset_format '{source.dataset_format}' is not known: use auto, {', '.join(FORMATS)}"
            )
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        raise HalfbyteError(f"{len(weights)} of {len(sources)} data sets have a weight: give one to all or to none")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise HalfbyteError(f"the weights of data sets are {weights}: each must be a number above 0")
    readers = [_reader(source, on_bad_row) for source in sources]
    return _mixed(readers, weights) if weights else (row for reader in readers for row in reader(True))


_Reader = Callable[[bool], Iterator[Row]]  # of whether bad rows are to be told: they are, the first time


def _reader(source: Source, on_bad_row: OnBadRow | None) -> _Reader:
    open_records = open_source(source)

    def silent(_: HalfbyteError) -> None:
        pass

    def read(tell: bool) -> Iterator[Row]:
        return _rows(open_records(), source, on_bad_row if tell or on_bad_row is None else silent)

    return read


def _rows(records: Iterator[Record], source: Source, on_bad_row: OnBadRow | None) -> Iterator[Row]:
    dataset_format = source.dataset_format
    found = read = 0
    for record in records:
        found += 1
        try:
            if record.error is not None:
                raise record.error
            if not isinstance(record.value, dict):
                raise HalfbyteError(
                    f"{record.source}: a row must be an object with named keys, this is {kind(record.value)}"
                )
            if dataset_format == "auto":
                dataset_format = detect_format(record.value, record.source)
            row = read_record(record.value, record.source, dataset_format)
        except HalfbyteError as error:
            if on_bad_row is None:
                raise
            on_bad_row(error)
            continue
        read += 1
        yield row
    if not read:
        where = f"{source.path} {source.split}" if source.split else source.path
        what = f"none of its {found:,} rows can be read" if found else "there are no rows in it"
        raise HalfbyteError(f"{where}: {what}, so there is nothing to learn")


def _mixed(readers: Sequence[_Reader], weights: Sequence[float]) -> Iterator[Row]:
    streams = [reader(True) for reader in readers]
    waiting = [next(stream) for stream in streams]  # the next row of each; an empty set is an error of its own
    taken = [0] * len(streams)
    read_once = [False] * len(streams)
    while not all(read_once):
        # Whose turn would come first if each took its turns at a speed of its weight.
        index = min(range(len(streams)), key=lambda i: (taken[i] + 1) / weights[i])
        taken[index] += 1
        row, following = waiting[index], next(streams[index], None)
        if following is None:
            read_once[index] = True
            if not all(read_once):
                streams[index] = readers[index](False)
                following = next(streams[index])
        if following is not None:
            waiting[index] = following
        yield row
