"""Reading: what is a row is read whole, what is not stops with file and line, whatever the bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from halfbyte.data import Alpaca, Row
from halfbyte.data import read_rows as read_rows_lazily
from halfbyte.errors import HalfbyteError

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
CHAT = {"messages": [USER, ASSISTANT]}
ALPACA = {"instruction": "add", "input": "1 and 2", "output": "3"}


def read_rows(path: Path | str, *arguments: object) -> list[Row]:
    return list(read_rows_lazily(path, *arguments))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_messages_and_alpaca_rows_are_told_apart_by_their_keys(tmp_path):
    system = {"role": "system", "content": "be brief"}
    path = write(tmp_path / "chat.jsonl", jsonl({"messages": [system, USER, ASSISTANT, USER, ASSISTANT]}))
    (row,) = read_rows(path)
    assert row.messages == [system, USER, ASSISTANT, USER, ASSISTANT]
    assert row.alpaca is None

    path = write(tmp_path / "alpaca.jsonl", jsonl(ALPACA, {"instruction": "sing", "output": "la"}))
    with_input, without = read_rows(path)
    assert [m["content"] for m in with_input.messages] == ["add\n\n1 and 2", "3"]
    assert [m["role"] for m in with_input.messages] == ["user", "assistant"]
    assert with_input.alpaca == Alpaca("add", "1 and 2", "3")
    assert [m["content"] for m in without.messages] == ["sing", "la"]
    assert without.alpaca == Alpaca("sing", "", "la")


def test_the_source_is_the_line_in_the_file(tmp_path):
    lines = write(tmp_path / "a.jsonl", "\n" + jsonl(CHAT) + "\r\n" + jsonl(CHAT) + "\n \n")
    assert [row.source for row in read_rows(lines)] == [f"{lines}:2", f"{lines}:4"]

    pretty = write(tmp_path / "a.json", json.dumps([ALPACA, ALPACA], indent=1))
    # indent=1 writes "[", then five lines for each row
    assert [row.source for row in read_rows(pretty)] == [f"{pretty}:2 (row 1)", f"{pretty}:7 (row 2)"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    content = "one\u2028two\u0085three\x0cfour"
    record = {"messages": [{"role": "user", "content": content}, ASSISTANT]}
    path = write(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=False).replace("\x0c", "\\f") + "\n")
    assert read_rows(path)[0].messages[0]["content"] == content


def test_windows_files_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(CHAT, CHAT).replace("\n", "\r\n").encode())
    assert [row.messages for row in read_rows(path)] == [[USER, ASSISTANT]] * 2


def test_other_columns_and_empty_ones_are_left_alone(tmp_path):
    record = CHAT | {"id": 7, "tools": None, "history": []}
    record = record | {"messages": [USER | {"tool_calls": None}, ASSISTANT]}
    assert read_rows(write(tmp_path / "a.jsonl", jsonl(record)))[0].messages == [USER, ASSISTANT]
    assert read_rows(write(tmp_path / "b.jsonl", jsonl(ALPACA | {"input": None})))[0].alpaca.input == ""


def test_dataset_format_decides_where_the_keys_cannot(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(CHAT | ALPACA))
    with pytest.raises(HalfbyteError, match=r"a\.jsonl:1: has both"):
        read_rows(path)
    assert read_rows(path, "messages")[0].messages == [USER, ASSISTANT]
    assert read_rows(path, "alpaca")[0].messages[1]["content"] == "3"
    with pytest.raises(HalfbyteError, match="dataset_format 'parrot' is not known"):
        read_rows(path, "parrot")


def chat(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


BAD_ROWS = [
    (7, "a row must be an object.*a number"),
    ([CHAT], "one list is named .json"),
    ({"words": "x"}, r"cannot be told from the keys \('words'\)"),
    ({}, r"cannot be told from the keys \(none\)"),
    (ALPACA | {"output": ""}, "'output' is empty"),
    (ALPACA | {"output": " \n"}, "'output' is empty"),
    (ALPACA | {"instruction": ""}, "'instruction' is empty"),
    (ALPACA | {"output": 3}, "'output' must be text, this is a number"),
    (ALPACA | {"output": True}, "'output' must be text, this is true or false"),
    (ALPACA | {"input": ["x"]}, "'input' must be text, this is a list"),
    ({"instruction": "x"}, "the key 'output' is missing"),
    (ALPACA | {"history": [["q", "a"]]}, "'history' is not something alpaca rows are trained with"),
    ({"messages": None}, "'messages' must be a list, this is null"),
    (chat(), "no assistant turn"),
    (chat(USER), "no assistant turn"),
    (chat(ASSISTANT, USER), "the first message is an assistant turn"),
    (chat(USER, "hi"), r"messages\[1\] must be an object.*text"),
    (chat(USER, {"role": "assistant"}), r"messages\[1\]: the key 'content' is missing"),
    (chat(USER, {"role": "assistant", "content": None}), r"messages\[1\]: 'content' must be text, this is null"),
    (chat({"from": "human"}, ASSISTANT), r"messages\[0\]: the key 'role' is missing"),
    (chat(USER, {"role": "assistant", "content": "  "}), r"messages\[1\]: the assistant turn is empty"),
    (chat({"role": "gpt", "content": "x"}, ASSISTANT), r"messages\[0\]: the role 'gpt' is not known"),
    (chat(USER, ASSISTANT | {"weight": 0}), r"messages\[1\]: 'weight' is not something this version trains on"),
    (chat(USER, ASSISTANT) | {"functions": [{"name": "f"}]}, "'functions' is not something messages rows are trained"),
    (chat({"role": "user", "content": "\ud83d"}, ASSISTANT), r"messages\[0\]: 'content' holds half of a surrogate"),
]


@pytest.mark.parametrize(("record", "message"), BAD_ROWS)
def test_a_bad_row_is_an_error_with_file_line_and_key(tmp_path, record, message):
    path = write(tmp_path / "rows.jsonl", jsonl(record, CHAT))
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:1: .*" + message):
        read_rows(path)


@pytest.mark.parametrize(("first", "dataset_format"), [(CHAT, "auto"), (ALPACA, "auto"), (CHAT, "messages")])
def test_the_first_row_sets_the_format_of_all(tmp_path, first, dataset_format):
    path = write(tmp_path / "rows.jsonl", jsonl(first, {"text": "neither"}))
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:2: the key '(messages|instruction)' is missing"):
        read_rows(path, dataset_format)


BAD_FILES = [
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
    ("a.json", b" \n", "a.json: the file is empty"),
    ("a.json", b"[ ]", "the list is empty"),
    ("a.jsonl", jsonl(CHAT).encode() + b'{"messages": [', r"a.jsonl:2: not valid JSON"),
    ("a.jsonl", jsonl(CHAT).encode() + b"{} {}\n", r"a.jsonl:2: more text after the first value"),
    ("a.jsonl", jsonl(CHAT).encode() + b'{"a": "\xff"}\n', r"a.jsonl:2: not valid UTF-8"),
    ("a.jsonl", b"\xef\xbb\xbf\n\n\xc3(", r"a.jsonl:3: not valid UTF-8"),
    ("a.jsonl", b'{"output": "1", "output": "2", "instruction": "x"}', r"a.jsonl:1: the key 'output' occurs twice"),
    ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: .*nests too deeply"),
    ("a.jsonl", b"\n" + b"9" * 5000, r"a.jsonl:2: .*too long to read"),
    ("a.json", jsonl(CHAT).encode(), r"a.json:1: .*named .jsonl"),
    ("a.json", b"[\n" + json.dumps(CHAT).encode(), r"a.json:2: the list is cut off .* after row 1"),
    ("a.json", b"[\n" + json.dumps(CHAT).encode() + b",\n]", r"a.json:3: not valid JSON"),
    ("a.json", b"[\n" + json.dumps(CHAT).encode() + b"\n{}]", r"a.json:3: .*lacks a comma after row 1"),
    ("a.json", json.dumps([CHAT]).encode() + b"\n\nmore", r"a.json:3: there is text after the end"),
    ("a.json", b"[\n\n7]", r"a.json:3 \(row 1\): a row must be an object"),
    ("a.doc", b"hello", r"read from .jsonl, .*; not from '.doc'"),
    ("rows", b"hello", r"read from .jsonl, .*; not from ''"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES)
def test_a_bad_file_is_an_error_with_file_and_line(tmp_path, name, data, message):
    with pytest.raises(HalfbyteError, match=message):
        read_rows(write(tmp_path / name, data))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(HalfbyteError, match=r"none\.jsonl: there is no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(HalfbyteError, match=r"folder\.jsonl: there is no data file in this directory"):
        read_rows(tmp_path / "folder.jsonl")
    with pytest.raises(HalfbyteError, match="there is no such file or directory"):
        read_rows("a\0b.jsonl")
    with pytest.raises(HalfbyteError, match="cannot be read: File name too long"):
        read_rows("a" * 5000 + ".jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=4),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]) | json_values, "content": json_values}
)
near_rows = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(turns) | json_values, "instruction": json_values, "output": json_values}
)
near_files = st.lists(near_rows | json_values, max_size=3).map(lambda rows: jsonl(*rows).encode())


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@given(data=st.binary() | near_files | near_files.map(lambda data: b"[" + data.replace(b"\n", b",")[:-1] + b"]"))
@example(data=b"[")
@example(data=b"[1,")
@example(data=b"\xef\xbb\xbf")
@example(data=b'{"messages": NaN}')
def test_whatever_the_bytes_there_are_rows_or_a_halfbyte_error(tmp_path_factory, suffix, data):
    path = write(tmp_path_factory.getbasetemp() / f"hostile{suffix}", data)
    try:
        rows = read_rows(path)
    except HalfbyteError:
        return
    assert rows
    for row in rows:
        assert any(message["role"] == "assistant" and message["content"].strip() for message in row.messages)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    ascii_only=st.booleans(),
    indent=st.none() | st.just(2),
)
def test_every_row_comes_back_as_it_was_written(tmp_path_factory, pairs, ascii_only, indent):
    wanted = [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}] for user, answer in pairs]
    records = [{"messages": messages} for messages in wanted]
    folder = tmp_path_factory.getbasetemp()
    as_list = write(folder / "back.json", json.dumps(records, ensure_ascii=ascii_only, indent=indent))
    as_lines = write(folder / "back.jsonl", "\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records))
    assert [row.messages for row in read_rows(as_list)] == wanted
    assert [row.messages for row in read_rows(as_lines)] == wanted
