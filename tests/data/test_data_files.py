"""The kinds of file: the same rows from each, errors with the place, nothing read before it is asked for."""

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import read_rows
from halfbyte.data.files import read_file
from halfbyte.errors import HalfbyteError

RECORDS = [
    {"instruction": "add", "input": "1 and 2", "output": '3,\n"three"\t✓'},
    {"instruction": "sing\u2028loud", "input": "", "output": "la"},
    {"instruction": "end", "input": "", "output": "."},
]


def lines(records: list[dict]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def table(records: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(records: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(records), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def arrow(records: list[dict], kind: Callable = pa.ipc.new_stream) -> bytes:
    data, sink = pa.Table.from_pylist(records), pa.BufferOutputStream()
    with kind(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return sink.getvalue().to_pybytes()


LINES = [":1", ":2", ":3"]
ROWS = [" (row 1)", " (row 2)", " (row 3)"]
KINDS = {
    "a.jsonl": (lines(RECORDS), LINES),
    "a.ndjson": (lines(RECORDS), LINES),
    "a.JSONL": (lines(RECORDS), LINES),
    "a.jsonl.gz": (gzip.compress(lines(RECORDS)), LINES),
    "b.jsonl.gz": (gzip.compress(lines(RECORDS[:2])) + gzip.compress(lines(RECORDS[2:])), LINES),
    "a.jsonl.zst": (zstd(lines(RECORDS)), LINES),
    "b.jsonl.zst": (zstd(lines(RECORDS[:2])) + zstd(lines(RECORDS[2:])), LINES),
    "a.json": (json.dumps(RECORDS).encode(), [":1 (row 1)", ":1 (row 2)", ":1 (row 3)"]),
    "b.json": (json.dumps(RECORDS, indent=1).encode(), [":2 (row 1)", ":7 (row 2)", ":12 (row 3)"]),
    "a.json.gz": (gzip.compress(json.dumps(RECORDS).encode()), [":1 (row 1)", ":1 (row 2)", ":1 (row 3)"]),
    "a.csv": (table(RECORDS), [":2", ":4", ":5"]),
    "b.csv": (b"\xef\xbb\xbf" + table(RECORDS).replace(b"\r\n", b"\n"), [":2", ":4", ":5"]),
    "a.csv.gz": (gzip.compress(table(RECORDS)), [":2", ":4", ":5"]),
    "a.tsv": (table(RECORDS, "\t"), [":2", ":4", ":5"]),
    "a.parquet": (parquet(RECORDS), ROWS),
    "a.arrow": (arrow(RECORDS), ROWS),
    "b.arrow": (arrow(RECORDS, pa.ipc.new_file), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, name):
    data, places = KINDS[name]
    (tmp_path / name).write_bytes(data)
    rows = list(read_rows(tmp_path / name))
    assert [row.alpaca._asdict() for row in rows] == RECORDS
    assert [row.source for row in rows] == [f"{tmp_path / name}{place}" for place in places]


def test_plain_text_is_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("first\r\n\n  second\u2028still \nthird".encode())
    rows = list(read_rows(tmp_path / "a.txt"))
    assert [row.pieces for row in rows] == [(("first", True),), (("  second\u2028still ", True),), (("third", True),)]
    assert [row.source.rpartition(":")[2] for row in rows] == ["1", "3", "4"]


def test_a_null_in_a_table_is_a_key_that_is_not_there(tmp_path):
    first = {"role": "user", "content": "hello", "tool_calls": None}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}}
    second = {"role": "assistant", "content": None, "tool_calls": [call, other]}
    (tmp_path / "a.parquet").write_bytes(parquet([{"messages": [first, second], "tools": None}]))
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call, other]},
    ]
    assert row.tools is None


def bad_utf8_column(kind: Callable[[pa.Table], bytes]) -> bytes:
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    return kind(pa.table({"text": text}))


def as_parquet(data: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(data, sink)
    return sink.getvalue().to_pybytes()


def arrow_of(data: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue().to_pybytes()


HEADER = b"instruction,output\n"
# What is wrong, and at which place; what nobody could go on from, and what is one row's alone.
FATAL = {
    "a.jsonl.gz": (b"hello", r"a\.jsonl\.gz:1: cannot be decompressed"),
    "b.jsonl.gz": (gzip.compress(lines(RECORDS) * 40_000)[:-9], r"b\.jsonl\.gz:\d{4,}: cannot be decom.*cut off"),
    "a.jsonl.zst": (b"hello", r"a\.jsonl\.zst:1: cannot be decompressed"),
    "b.jsonl.zst": (zstd(lines(RECORDS) * 1000)[:-9], r"b\.jsonl\.zst:\d+: cannot be decompressed"),
    "c.jsonl.gz": (gzip.compress(b""), r"c\.jsonl\.gz: the file is empty"),
    "a.csv": (b"", "a.csv: the file is empty"),
    "b.csv": (HEADER, "b.csv: there are no rows in it"),
    "c.csv": (b"instruction,instruction\n", "c.csv:1: the header names the column 'instruction' twice"),
    "d.csv": (b"instruction,,output\n", "d.csv:1: column 2 of the header has no name"),
    "e.csv": (HEADER + b"a,b\n\"a,b\nc,d\n", "e.csv:3: not a row of a table: unexpected end of data"),
    "f.csv": (HEADER + b'a,"b"c\n', "f.csv:2: not a row of a table"),
    "g.csv": (b"instr\xff,output\na,b\n", "g.csv:1: not valid UTF-8"),
    "h.csv": (HEADER + b"a,b\rc,d\n", "h.csv:2: not a row of a table"),
    "a.txt": (b" \n\n", "a.txt: the file is empty"),
    "a.parquet": (b"PAR1 but no more", "a.parquet: not a Parquet file, or cut off or damaged"),
    "b.parquet": (parquet(RECORDS)[:-20], "b.parquet: not a Parquet file, or cut off or damaged"),
    "c.parquet": (b"", "c.parquet: not a Parquet file, or cut off or damaged"),
    "d.parquet": (as_parquet(pa.table({"text": pa.array([], pa.string())})), "d.parquet: there are no rows in it"),
    "a.arrow": (b"hello", "a.arrow: not a Arrow file"),
    "b.arrow": (arrow(RECORDS * 500)[:-3000], r"b\.arrow.*: not a Arrow file, or cut off or damaged"),
    "c.arrow": (b"", "c.arrow: not a Arrow file"),
    "a.parquet.gz": (b"", "a data set is read from"),
    "a.gz": (b"", "a data set is read from"),
    "a.json": (b"[{}, {\"a\": \"" + b"x" * 3_000_000, r"a\.json:1: not valid JSON: Unterminated string"),
    "b.json": (b"[\n" + b" {},\n" * 300_000 + b" {\"a\" 1},\n]", r"b\.json:300002: not valid JSON.*\(column 7\)"),
    "c.json": (b"[" + b"{}, " * 600_000 + b"{\"a\" 1}]", r"c\.json:1: not valid JSON.*\(column 2400007\)"),
    "d.json": (b"[" + b"{},\n" * 300_000 + b"\xff]", r"d\.json:300001: not valid UTF-8"),
    "e.json": (b"[" + b"{},\n" * 300_000 + b"{}", r"e\.json:300001: the list is cut off .* after row 300001"),
}  # fmt: skip


@pytest.mark.parametrize("name", FATAL)
def test_a_bad_file_is_an_error_with_the_place(tmp_path, name):
    data, message = FATAL[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(HalfbyteError, match=message) as caught:
        for _ in read_rows(tmp_path / name, on_bad_row=lambda error: None):
            pass
    assert "\n" not in str(caught.value)


GOOD_LINE = lines(RECORDS[2:])
ONE_ROW = {
    "a.jsonl": (GOOD_LINE + b"{\n" + GOOD_LINE, r"a\.jsonl:2: not valid JSON"),
    "b.jsonl": (GOOD_LINE + b'{"a": "\xff"}\n' + GOOD_LINE, r"b\.jsonl:2: not valid UTF-8"),
    "c.jsonl": (GOOD_LINE + b"{} {}\n" + GOOD_LINE, r"c\.jsonl:2: more text after the first value"),
    "d.jsonl": (GOOD_LINE + b"[" * 100_000 + b"\n" + GOOD_LINE, r"d\.jsonl:2: the JSON nests too deeply"),
    "e.jsonl": (GOOD_LINE + b'{"a": 1, "a": 2}\n' + GOOD_LINE, r"e\.jsonl:2: the key 'a' occurs twice"),
    "f.jsonl": (GOOD_LINE + b"7\n" + GOOD_LINE, r"f\.jsonl:2: a row must be an object"),
    "g.jsonl": (b"{}\n" + GOOD_LINE * 2, r"g\.jsonl:1: the format cannot be told"),
    "a.json": (
        b"[" + GOOD_LINE + b',{"a": {"b": 1, "b": 2}},\n' + GOOD_LINE + b"]",
        r"a\.json:2 \(row 2\): the key 'b' occurs twice",
    ),
    "b.json": (b"[" + GOOD_LINE + b",null,\n" + GOOD_LINE + b"]", r"b\.json:2 \(row 2\): a row must be .* null"),
    "a.csv": (HEADER + b"a,b\nc\nd,e\n", r"a\.csv:3: 1 cells in this row, where the header names 2 columns"),
    "b.csv": (HEADER + b"a,b\nc,d,e\nd,e\n", r"b\.csv:3: 3 cells in this row"),
    "c.csv": (HEADER + b"a,b\n\"c\nd\xff\",e\n\nd,e\n", r"c\.csv:4: not valid UTF-8"),
    "d.csv": (HEADER + b"a,b\nc,\nd,e\n", r"d\.csv:3: 'output' is empty"),
    "a.txt": (b"one\n\xff\xfe\nthree\n", r"a\.txt:2: not valid UTF-8"),
    "a.parquet": (
        parquet([RECORDS[1], {"instruction": "x", "input": "", "output": None}, RECORDS[2]]),
        r"a\.parquet \(row 2\): the key 'output' is missing",
    ),
    "b.parquet": (as_parquet(pa.table({"text": ["one", "", "three"]})), r"b\.parquet \(row 2\): 'text' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_bad_row_stops_the_reading_or_is_handed_over(tmp_path, name):
    data, message = ONE_ROW[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(HalfbyteError, match=message):
        list(read_rows(tmp_path / name))
    told: list[HalfbyteError] = []
    rows = list(read_rows(tmp_path / name, on_bad_row=told.append))
    assert len(rows) == 2
    assert len(told) == 1
    with pytest.raises(HalfbyteError, match="^" + str(tmp_path) + ".*" + message):
        raise told[0]


@pytest.mark.parametrize("kind", [as_parquet, arrow_of], ids=["parquet", "arrow"])
def test_a_text_that_is_not_utf8_in_a_table(tmp_path, kind):
    path = tmp_path / ("a.parquet" if kind is as_parquet else "a.arrow")
    path.write_bytes(bad_utf8_column(kind))
    told: list[HalfbyteError] = []
    assert [row.pieces[0].text for row in read_rows(path, on_bad_row=told.append)] == ["a"]
    assert [str(error) for error in told] == [f"{path} (row 2): not valid UTF-8 (invalid start byte)"]


def test_where_every_row_is_bad_there_is_nothing_to_learn(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n{}\n")
    told: list[HalfbyteError] = []
    with pytest.raises(HalfbyteError, match=r"a\.jsonl: none of its 2 rows can be read"):
        list(read_rows(tmp_path / "a.jsonl", on_bad_row=told.append))
    assert len(told) == 2


def test_a_row_is_read_when_it_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD_LINE + b"not JSON\n")
    rows = read_rows(tmp_path / "a.jsonl")
    assert next(rows).alpaca.output == "."
    with pytest.raises(HalfbyteError, match=r"a\.jsonl:2"):
        next(rows)


def test_what_is_not_there_is_told_before_a_row_is_asked_for(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path / "absent"):
        with pytest.raises(HalfbyteError, match="there is no such file"):
            read_rows(path)


LONG = {"instruction": "x" * 700, "input": "", "output": "y" * 300}
MANY = 40_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_large_file_is_read_in_little_memory(tmp_path, name):
    """40 MB of rows. What Python holds at most is counted by tracemalloc, what Arrow does by its own pool."""
    path = tmp_path / name
    plain = lines([LONG]) * MANY  # before tracemalloc begins to count
    made = {
        ".jsonl": lambda: plain,
        ".gz": lambda: gzip.compress(plain, 1),
        ".zst": lambda: zstd(plain),
        ".json": lambda: b"[" + plain.strip().replace(b"\n", b",") + b"]",
        ".csv": lambda: table([LONG] * MANY),
        ".parquet": lambda: as_parquet(pa.Table.from_pylist([LONG | {"id": i} for i in range(MANY)])),
        ".arrow": lambda: arrow_of(pa.Table.from_pylist([LONG] * MANY)),
    }
    path.write_bytes(made[path.suffix]())
    del made
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == MANY
    assert peak < 12 << 20
    assert pa.total_allocated_bytes() - before < 12 << 20


def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    for module in ("compression", "json_files"):
        monkeypatch.setattr(f"halfbyte.data.{module}.LONGEST_RECORD_BYTES", 2 << 20)
    for name, data in (("a.jsonl", b"\n{"), ("a.csv", b'text\n"'), ("a.json", b'[\n"'), ("a.json.gz", b'[\n"')):
        data += b"x" * (8 << 20)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        with pytest.raises(HalfbyteError, match=rf"{name}:2: a (line|value) of more than 2 MiB is no row"):
            list(read_file(tmp_path / name))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_list_is_the_same_wherever_a_piece_of_it_ends(tmp_path, monkeypatch, size):
    monkeypatch.setattr("halfbyte.data.compression._CHUNK_BYTES", size)
    monkeypatch.setattr("halfbyte.data.json_files._KEPT_CHARACTERS", size)
    values = [*RECORDS, {"a": [1.5e-7, True, None, '😀 \\ " é'], "b": {}}, {}, {"c": -12345678901234567890}]
    for indent in (None, 2):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=bool(indent)), encoding="utf-8")
        records = list(read_file(path))
        assert [record.value for record in records] == values
        whole = path.read_text(encoding="utf-8").split("\n")
        starts = [number for number, line in enumerate(whole, 1) if line in ("  {", "  {},", "  {}")] or [1] * len(
            values
        )
        assert [record.source for record in records] == [f"{path}:{n} (row {i})" for i, n in enumerate(starts, 1)]


hostile = st.binary(max_size=300) | st.sampled_from([data for data, _ in KINDS.values()]).flatmap(
    lambda data: st.tuples(st.integers(0, len(data)), st.integers(0, len(data)), st.binary(max_size=3)).map(
        lambda cut: data[: min(cut[:2])] + cut[2] + data[max(cut[:2]) :]
    )
)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"]
)
@given(data=hostile)
def test_whatever_the_bytes_there_are_rows_or_errors_that_name_the_file(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / f"hostile-{name}"
    path.write_bytes(data)
    told: list[HalfbyteError] = []
    try:
        rows = list(read_rows(path, on_bad_row=told.append))
    except HalfbyteError as error:
        told.append(error)
    else:
        assert rows
        assert all(row.source.startswith(str(path)) for row in rows)
    assert all(str(error).startswith(str(path)) for error in told)
