"""Parquet and Arrow files, a batch of rows at a time: pyarrow, which is loaded when one is read.

An Arrow table has every key of a struct in every row, so a key that a row does not have is null there: nulls inside
structs are taken for absent keys. A row has a number, from 1, where a text file has a line.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.data.records import Record, bad_record
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

ROWS_PER_BATCH = 256  # so many are Python objects at a time


def read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile

    def batches() -> Iterator["RecordBatch"]:
        # Without pre-buffering, which holds a whole row group beside the batch.
        with ParquetFile(path, pre_buffer=False) as file:
            yield from file.iter_batches(batch_size=ROWS_PER_BATCH)

    return _read_file(path, batches(), "Parquet")


def read_arrow(path: Path) -> Iterator[Record]:
    """An Arrow IPC file or stream; the `datasets` package writes streams."""
    import pyarrow

    def batches() -> Iterator["RecordBatch"]:
        with pyarrow.memory_map(str(path)) as memory:
            if memory.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(memory)
                for number in range(file.num_record_batches):
                    yield file.get_batch(number)
            else:
                memory.seek(0)
                yield from pyarrow.ipc.open_stream(memory)

    return _read_file(path, batches(), "Arrow")


def _read_file(path: Path, batches: Iterator["RecordBatch"], kind: str) -> Iterator[Record]:
    import pyarrow

    row = 0
    try:
        path.open("rb").close()  # the system's own words for a file that cannot be opened
        for record in read_batches(batches, str(path)):
            row += 1
            yield record
    except FileNotFoundError:
        raise HalfbyteError(f"{path}: there is no such file") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise HalfbyteError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        where = f"{path} (row {row + 1})" if row else f"{path}"
        reason = str(error).strip().partition("\n")[0]
        raise HalfbyteError(f"{where}: not a {kind} file, or cut off or damaged: {reason}") from None


def read_batches(batches: Iterable["RecordBatch"], name: str) -> Iterator[Record]:
    """The rows of all batches, as "name (row n)"."""
    done = 0
    for batch in batches:
        _check_offsets(batch)
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            part = batch.slice(start, ROWS_PER_BATCH)
            yield from _rows(part, name, done)
            done += part.num_rows


def _check_offsets(batch: "RecordBatch") -> None:
    """Raises ArrowInvalid where a column points outside its own memory, which pyarrow would follow.

    A column of text that is not UTF-8 passes, since its offsets were looked at first: which row it is, is told later.
    """
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
            if not (is_text and "UTF8" in str(error)):
                raise


def _rows(batch: "RecordBatch", name: str, before: int) -> Iterator[Record]:
    try:
        values = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for index in range(batch.num_rows):
                yield from _rows(batch.slice(index, 1), name, before + index)
        elif isinstance(error, UnicodeDecodeError):
            yield bad_record(f"{name} (row {before + 1})", f"not valid UTF-8 ({error.reason})")
        else:  # a date that Python has no number for
            yield bad_record(f"{name} (row {before + 1})", f"a value cannot be read: {error}")
        return
    for index, value in enumerate(values, start=before + 1):
        yield Record(_without_nulls(value), f"{name} (row {index})")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value
