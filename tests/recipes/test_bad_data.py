"""Every kind of bad data, in every kind of file, handed to `finetune` itself: refused with file and line before a model
is loaded; and where a row may be left out, the rows that are learned and the one that is not make up the whole."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console

from halfbyte.data import cache
from halfbyte.errors import HalfbyteError
from halfbyte.recipes.finetune import finetune
from models import CHATML
from runs import configure


def turns(*texts: Any, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    } | more


def said(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns)} | more


def share(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns]} | more


def tree(question: str, *answers: str) -> dict[str, Any]:
    replies = [{"role": "assistant", "text": answer} for answer in answers]
    return {"message_tree_id": "1", "prompt": {"role": "prompter", "text": question, "replies": replies}}


ASKED = [("How deep is the harbour?", "Nine metres."), ("Who built it?", "The town."), ("Is it lit?", "By night.")]
HELD_OUT = [turns(f"Is berth {number} free?", "It is.") for number in (1, 2, 3)]
USER, ANSWER = {"role": "user", "content": "Is it deep?"}, {"role": "assistant", "content": "Nine metres."}
LAYOUTS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": turns,
    "alpaca": lambda question, answer: {"instruction": question, "input": "", "output": answer},
    "sharegpt": lambda question, answer: share(("human", question), ("gpt", answer)),
    "prompt-completion": lambda question, answer: {"prompt": question, "completion": answer},
    "hh-rlhf": lambda question, answer: {"chosen": f"\n\nHuman: {question}\n\nAssistant: {answer}"},
    "chip2": lambda question, answer: {"text": f"<human>: {question}\n<bot>: {answer}"},
    "oasst1": tree,
    "text": lambda question, answer: {"text": f"{question} {answer}"},
    "question": lambda question, answer: {"question": question, "output": answer},
}
GOOD = {name: [layout(*pair) for pair in ASKED] for name, layout in LAYOUTS.items()}


# ── Files of three good rows and a bad one, which is the third unless it is put first ────────────────────────────────


def with_bad(bad: Any, layout: str = "messages", at: int = 2) -> list[Any]:
    return [*GOOD[layout][:at], bad, *GOOD[layout][at:]]


def lines(rows: list[Any]) -> bytes:
    """A line for each; bytes as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def jsonl(bad: Any, layout: str = "messages", at: int = 2) -> dict[str, bytes]:
    return {"rows.jsonl": lines(with_bad(bad, layout, at))}


def listed(bad: bytes | None = None) -> bytes:
    """A list of a row a line, from the second line on; the bad one is on the fourth."""
    rows = with_bad(bad) if bad is not None else GOOD["messages"]
    return b"[\n" + lines(rows).rstrip().replace(b"\n", b",\n") + b"\n]"


def table(*bad: str | bytes, delimiter: str = ",", layout: str = "alpaca") -> bytes:
    """The header, two rows, the bad line on the fourth, a row."""
    text = io.StringIO(newline="")
    rows = [{key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()} for row in GOOD[layout]]
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    whole = text.getvalue().encode().splitlines()
    bad_lines = [line if isinstance(line, bytes) else line.encode() for line in bad]
    return b"\n".join([*whole[:3], *bad_lines, *whole[3:]]) + b"\n"


def parquet(data: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(data, sink)
    return sink.getvalue().to_pybytes()


def arrow(data: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def columns(bad: Any, layout: str = "messages") -> pa.Table:
    return pa.Table.from_pylist(with_bad(bad, layout))


def not_utf8() -> pa.Table:
    """Of the column `text` the third is not text."""
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 6, 7, 10))
    return pa.table(
        {"text": pa.Array.from_buffers(pa.string(), 4, [None, pa.py_buffer(offsets), pa.py_buffer(b"onetwo\xffend")])}
    )


# ── The kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bad(NamedTuple):
    files: dict[str, bytes]  # the first is the data set, unless `settings` say otherwise
    place: str
    words: str  # a pattern of what is said of it
    rows: int | None = 3  # how many are learned where one may be left out; None: nobody could go on
    settings: Mapping[str, Any] = MappingProxyType({})
    name: str = ""  # what the set with the bad row is called; the place's file unless given


CALL = {"type": "function", "function": {"name": "depth", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}
THIRD = "rows.jsonl:3"


def calling(**call: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": call}]
    return said(USER, {"role": "assistant", "content": None, "tool_calls": calls})


LINES = {
    "a line that is cut off": Bad(jsonl(b'{"messages": [{"role": "user"'), THIRD, "not valid JSON"),
    "quotes of another kind": Bad(jsonl(b"{'messages': []}"), THIRD, r"not valid JSON.*\(column 2\)"),
    "two values on a line": Bad(jsonl(lines(GOOD["messages"][:1]).strip() * 2), THIRD, "more text after the first"),
    "bytes that are not UTF-8": Bad(jsonl(b'{"text": "\xe9"}'), THIRD, "not valid UTF-8.*save the file as UTF-8"),
    "a file in UTF-16": Bad(
        {"rows.jsonl": lines(GOOD["messages"]).decode().encode("utf-16")}, "rows.jsonl:1", "not valid UTF-8", None
    ),
    "half a surrogate pair": Bad(jsonl(turns("\ud800", "Yes.")), THIRD, "half of a surrogate pair"),
    "a key that occurs twice": Bad(jsonl(b'{"messages": [], "messages": []}'), THIRD, "'messages' occurs twice"),
    "nesting without end": Bad(jsonl(b"[" * 100_000), THIRD, "nests too deeply"),
    "a row that is a list": Bad(jsonl([1, 2]), THIRD, "must be an object with named keys, this is a list"),
    "a row that is a text": Bad(jsonl("Hello"), THIRD, "must be an object with named keys, this is text"),
    "a row that is null": Bad(jsonl(None), THIRD, "must be an object with named keys, this is null"),
    "a list in a file of lines": Bad(
        {"rows.jsonl": json.dumps(GOOD["messages"]).encode()}, "rows.jsonl:1", "one list is named .json", None
    ),
    "keys of no format": Bad(jsonl({"a": 1}, at=0), "rows.jsonl:1", r"cannot be told from the keys \('a'\)"),
    "keys of two formats": Bad(
        jsonl(turns("a", "b", conversations=[]), at=0), "rows.jsonl:1", "has both 'messages' and 'conversations'"
    ),
    "no column of that name": Bad(
        jsonl({"output": "Yes."}, "question"),
        THIRD,
        "there is no column 'question', which columns names",
        settings={"columns": {"instruction": "question"}},
    ),
}
CONVERSATIONS = {
    "no messages": Bad(jsonl({"question": "Why?"}), THIRD, "the key 'messages' is missing"),
    "messages that are text": Bad(jsonl({"messages": "Hello"}), THIRD, "'messages' must be a list, this is text"),
    "a list without a message": Bad(jsonl({"messages": []}), THIRD, "there is no assistant turn"),
    "a message that is text": Bad(jsonl({"messages": ["Hello"]}), THIRD, r"messages\[0\] must be an object"),
    "no role": Bad(jsonl(said({"content": "a"}, ANSWER)), THIRD, r"messages\[0\]: the key 'role' is missing"),
    "a role that is a number": Bad(jsonl(said({"role": 1, "content": "a"}, ANSWER)), THIRD, "'role' must be text"),
    "an unknown role": Bad(jsonl(said({"role": "robot", "content": "a"}, ANSWER)), THIRD, "role 'robot' is not known"),
    "no content": Bad(jsonl(said({"role": "user"}, ANSWER)), THIRD, "the key 'content' is missing"),
    "content that is null": Bad(jsonl(turns(None, "Yes.")), THIRD, "'content' must be text, this is null"),
    "content that is a number": Bad(jsonl(turns(1, "Yes.")), THIRD, "'content' must be text, this is a number"),
    "a picture": Bad(jsonl(turns([{"type": "image_url"}], "Yes.")), THIRD, "of the type 'image_url': halfbyte trains"),
    "an empty answer": Bad(jsonl(turns("Why?", "")), THIRD, r"messages\[1\]: the assistant turn is empty"),
    "an answer of white space": Bad(jsonl(turns("a", "b", "c", " \n")), THIRD, r"messages\[3\]: .* turn is empty"),
    "nobody answers": Bad(jsonl(turns("Why?")), THIRD, "there is no assistant turn, so nothing to learn"),
    "an answer to nothing": Bad(jsonl(said(ANSWER, USER, ANSWER)), THIRD, "the first message is an assistant turn"),
    "a weight": Bad(jsonl(said(USER, ANSWER | {"weight": 0})), THIRD, "'weight' is not something this version trains"),
    "a call by the user": Bad(jsonl(said(USER | {"tool_calls": [CALL]}, ANSWER)), THIRD, "only the assistant calls"),
    "a call of nothing": Bad(jsonl(calling(arguments="{}")), THIRD, r"tool_calls\[0\]: the key 'name' is missing"),
    "arguments that are a list": Bad(jsonl(calling(name="f", arguments=[1])), THIRD, "'arguments' must be an object"),
    "arguments that are no JSON": Bad(jsonl(calling(name="f", arguments="{a")), THIRD, "'arguments' .* this is text"),
    "tools that are a number": Bad(jsonl(turns("a", "b", tools=5)), THIRD, "'tools' must be a list, this is a number"),
    "a tool without a name": Bad(jsonl(turns("a", "b", tools=[{"function": {}}])), THIRD, r"tools\[0\].*'name'"),
    "tools that the template drops": Bad(jsonl(turns("a", "b", tools=[TOOL])), THIRD, "passes over tools"),
    "reasoning that the template drops": Bad(
        jsonl(said(USER, ANSWER | {"reasoning_content": "Hm."})), THIRD, "passes over 'reasoning_content'"
    ),
    "a row that the template refuses": Bad(
        {
            **jsonl(said({"role": "system", "content": "Be brief."}, USER, ANSWER)),
            "own.jinja": b"{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}"
            + CHATML.encode(),
        },
        THIRD,
        "chat template refuses this conversation: no such role",
        settings={"chat_template": "own.jinja"},
    ),
    "somebody unknown": Bad(
        jsonl(share(("robot", "a"), ("gpt", "b")), "sharegpt"), THIRD, "'from' is 'robot', which is not known"
    ),
    "a turn without its text": Bad(
        jsonl({"conversations": [{"from": "human"}]}, "sharegpt"), THIRD, "the key 'value' is missing"
    ),
    "two system messages": Bad(
        jsonl(share(("system", "a"), ("human", "b"), ("gpt", "c"), system="d"), "sharegpt"), THIRD, "remove one of them"
    ),
    "a list of no calls": Bad(
        jsonl(share(("human", "a"), ("function_call", "[]")), "sharegpt"), THIRD, "the list of function calls is empty"
    ),
}
TEXTS = {
    "no instruction": Bad(jsonl({"output": "Yes."}, "alpaca"), THIRD, "the key 'instruction' is missing"),
    "an empty instruction": Bad(jsonl({"instruction": " ", "output": "b"}, "alpaca"), THIRD, "'instruction' is empty"),
    "no output": Bad(jsonl({"instruction": "a"}, "alpaca"), THIRD, "the key 'output' is missing"),
    "an empty output": Bad(jsonl({"instruction": "a", "output": ""}, "alpaca"), THIRD, "'output' is empty"),
    "an output that is null": Bad(
        jsonl({"instruction": "a", "output": None}, "alpaca"), THIRD, "'output' must be text, this is null"
    ),
    "an input that is a number": Bad(
        jsonl({"instruction": "a", "input": 1, "output": "b"}, "alpaca"), THIRD, "'input' must be text"
    ),
    "a history": Bad(
        jsonl({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "alpaca"),
        THIRD,
        "'history' is not something alpaca rows are trained with",
    ),
    "an empty completion": Bad(
        jsonl({"prompt": "a", "completion": "\n"}, "prompt-completion"), THIRD, "'completion' is empty"
    ),
    "tools beside texts": Bad(
        jsonl({"prompt": "a", "completion": "b", "tools": [TOOL]}, "prompt-completion"), THIRD, "'tools' beside texts"
    ),
    "an answer in the prompt": Bad(
        jsonl({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "prompt-completion"),
        THIRD,
        "an assistant turn in 'prompt' would be learned",
    ),
    "nobody speaks": Bad(jsonl({"chosen": "Hello."}, "hh-rlhf"), THIRD, "'chosen' has no mark of who speaks"),
    "text before anybody speaks": Bad(
        jsonl({"chosen": "Hm.\n\nHuman: a\n\nAssistant: b"}, "hh-rlhf"), THIRD, "'chosen' begins with no mark"
    ),
    "an answer to a prompt beside it": Bad(
        jsonl({"prompt": "a", "chosen": "b"}, "hh-rlhf"), THIRD, "'chosen' goes on from 'prompt'"
    ),
    "the bot says nothing": Bad(
        jsonl({"text": "<human>: a\n<bot>: "}, "chip2"), THIRD, "turn 2 of 'text', the assistant's, is empty"
    ),
    "a tree without an answer": Bad(jsonl(tree("Why?"), "oasst1"), THIRD, "nothing in this tree is an answer"),
    "an unknown role in a tree": Bad(
        jsonl({"message_tree_id": "1", "prompt": {"role": "robot", "text": "a"}}, "oasst1"), THIRD, "'robot' is not"
    ),
    "replies that are text": Bad(
        jsonl({"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": "b"}}, "oasst1"),
        THIRD,
        "'replies' must be a list",
    ),
    "one message of a tree": Bad(
        jsonl({"text": "a", "message_tree_id": "1", "parent_id": "0"}, "text"), THIRD, "one message of a tree"
    ),
    "an empty text": Bad(jsonl({"text": " "}, "text"), THIRD, "'text' is empty"),
    "a doubled BOS": Bad(
        jsonl({"text": "<|im_start|><|im_start|>a"}, "text"), THIRD, "begins with two BOS tokens, the template's"
    ),
    "a row that is too long": Bad(
        jsonl({"text": "a" * 200}, "text"),
        THIRD,
        "this row has 201 tokens and max_length is 128",
        settings={"truncation": "error"},
    ),
    "a held-out row that is trained on": Bad(
        {"rows.jsonl": lines(GOOD["messages"]), "held.jsonl": lines([*HELD_OUT, GOOD["messages"][1]])},
        "held.jsonl:4",
        "is the training row rows.jsonl:2",
        settings={"eval_dataset": "held.jsonl"},
    ),
}
BROKEN = b'{"messages": [{"role" "user"}]}'
KINDS_OF_FILE = {
    "a list that is cut off": Bad({"rows.json": listed()[:-2]}, "rows.json:4", "cut off or lacks a comma", None),
    "a list that lacks a comma": Bad(
        {"rows.json": listed().replace(b",\n", b"\n", 1)}, "rows.json:3", "lacks a comma after row 1", None
    ),
    "a list with a broken row": Bad({"rows.json": listed(BROKEN)}, "rows.json:4", "not valid JSON", None),
    "a list in another encoding": Bad({"rows.json": listed(b'"\xe9"')}, "rows.json:4", "not valid UTF-8", None),
    "text behind a list": Bad(
        {"rows.json": listed() + b"\nend"}, "rows.json:6", "text after the end of the list", None
    ),
    "a list that is an object": Bad({"rows.json": b"{}"}, "rows.json:1", r"must be one list \[\.\.\.\]", None),
    "a key twice in a list": Bad({"rows.json": listed(b'{"a": 1, "a": 2}')}, "rows.json:4 (row 3)", "occurs twice"),
    "null in a list": Bad({"rows.json": listed(b"null")}, "rows.json:4 (row 3)", "must be an object .* null"),
    "a CSV row of too many cells": Bad({"rows.csv": table("a,b,c,d")}, "rows.csv:4", "4 cells in this row"),
    "a CSV row of too few cells": Bad({"rows.csv": table("a,b")}, "rows.csv:4", "2 cells .* names 3 columns"),
    "a CSV row in another encoding": Bad({"rows.csv": table(b"a,\xe9,b")}, "rows.csv:4", "not valid UTF-8"),
    "a CSV row without an answer": Bad({"rows.csv": table('"a\nb",c,')}, "rows.csv:4", "'output' is empty"),
    "a CSV cell of broken JSON": Bad(
        {"rows.csv": table('"[{""role"": user]"', layout="messages")}, "rows.csv:4", "'messages' must be a list"
    ),
    "a CSV quote that never closes": Bad({"rows.csv": table('a,"b,c')}, "rows.csv:4", "not a row of a table", None),
    "a CSV quote in the midst": Bad({"rows.csv": table('a,"b"c,d')}, "rows.csv:4", "not a row of a table", None),
    "a CSV header with a name twice": Bad(
        {"rows.csv": b"output,output\na,b\n"}, "rows.csv:1", "names the column 'output' twice", None
    ),
    "a CSV header with no name": Bad({"rows.csv": b"instruction,\na,b\n"}, "rows.csv:1", "column 2 .* no name", None),
    "a CSV header of another table": Bad({"rows.csv": b"a,b\nc,d\n"}, "rows.csv:2", "format cannot be told", None),
    "a TSV row of too many cells": Bad(
        {"rows.tsv": table("a\tb\tc\td", delimiter="\t")}, "rows.tsv:4", "4 cells in this row"
    ),
    "a line in another encoding": Bad({"rows.txt": b"one\n\ntwo\n\xe9\nthree\n"}, "rows.txt:4", "not valid UTF-8"),
    "a null in Parquet": Bad(
        {"rows.parquet": parquet(columns({"instruction": "a", "output": None}, "alpaca"))},
        "rows.parquet (row 3)",
        "the key 'output' is missing",
    ),
    "an unknown role in Parquet": Bad(
        {"rows.parquet": parquet(columns(said({"role": "robot", "content": "a"}, ANSWER)))},
        "rows.parquet (row 3)",
        r"messages\[0\]: the role 'robot' is not known",
    ),
    "an empty answer in Parquet": Bad(
        {"rows.parquet": parquet(columns(turns("Why?", "")))}, "rows.parquet (row 3)", "the assistant turn is empty"
    ),
    "numbers in Parquet": Bad(
        {"rows.parquet": parquet(pa.table({"text": [1, 2]}))}, "rows.parquet (row 1)", "'text' must be text", None
    ),
    "Parquet text in another encoding": Bad({"rows.parquet": parquet(not_utf8())}, "rows.parquet (row 3)", "UTF-8"),
    "a null in Arrow": Bad(
        {"rows.arrow": arrow(columns({"instruction": None, "output": "a"}, "alpaca"))},
        "rows.arrow (row 3)",
        "the key 'instruction' is missing",
    ),
    "Arrow text in another encoding": Bad({"rows.arrow": arrow(not_utf8())}, "rows.arrow (row 3)", "not valid UTF-8"),
    "an Arrow file that is cut off": Bad(
        {"rows.arrow": arrow(columns({"text": "a"}, "text"))[:-40]}, "rows.arrow (row 3)", "cut off or damaged", None
    ),
    "a bad row in a gz file": Bad(
        {"rows.jsonl.gz": gzip.compress(lines(with_bad(BROKEN)))}, "rows.jsonl.gz:3", "not valid JSON"
    ),
    "a gz file that is cut off": Bad(
        {"rows.jsonl.gz": gzip.compress(lines(GOOD["messages"]))[:-9]},
        "rows.jsonl.gz:1",
        "cannot be decompressed",
        None,
    ),
    "a gz file that is none": Bad({"rows.csv.gz": table()}, "rows.csv.gz:1", "not what its name says", None),
    "a bad row in a zst file": Bad({"rows.csv.zst": zstd(table("a,b"))}, "rows.csv.zst:4", "2 cells in this row"),
    "a zst file that is cut off": Bad(
        {"rows.jsonl.zst": zstd(lines(GOOD["messages"]))[:-9]}, "rows.jsonl.zst:1", "cannot be decompressed", None
    ),
    "a zst file that is none": Bad(
        {"rows.jsonl.zst": lines(GOOD["messages"])}, "rows.jsonl.zst:1", "not what its name says", None
    ),
    "a bad row in the second file of a directory": Bad(
        {"data/a.parquet": parquet(pa.Table.from_pylist(GOOD["messages"])), "data/b.jsonl": lines(with_bad(BROKEN))},
        "data/b.jsonl:3",
        "not valid JSON",
        6,
        {"dataset": "data"},
        "data",
    ),
    "a bad row in a gz file of a directory": Bad(
        {"data/deep/a.csv": table(), "data/deep/b.csv.gz": gzip.compress(table("a,b"))},
        "data/deep/b.csv.gz:4",
        "2 cells in this row",
        6,
        {"dataset": "data"},
        "data",
    ),
    "a directory of two formats": Bad(
        {"data/a.jsonl": lines(GOOD["messages"]), "data/b.jsonl": lines(GOOD["alpaca"])},
        "data/b.jsonl:1",
        "the key 'messages' is missing",
        None,
        {"dataset": "data"},
    ),
    "a bad row in the second data set": Bad(
        {"a.jsonl": lines(GOOD["messages"]), "b.jsonl": lines(with_bad(BROKEN))},
        "b.jsonl:3",
        "not valid JSON",
        6,
        {"dataset": ["a.jsonl", "b.jsonl"]},
        "a.jsonl and 1 more",
    ),
    "a bad row in a mix": Bad(
        {"a.jsonl": lines(GOOD["messages"]), "b.csv": table("a,b,")},
        "b.csv:4",
        "'output' is empty",
        6,
        {"dataset": [{"path": "a.jsonl", "weight": 1}, {"path": "b.csv", "weight": 1}]},
        "a.jsonl and 1 more",
    ),
}
KINDS = LINES | CONVERSATIONS | TEXTS | KINDS_OF_FILE
# What is wrong with a whole file has no line.
FILES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no file": ({}, "rows.jsonl", "there is no such file"),
    "an empty file": ({"rows.jsonl": b"\n \n"}, "rows.jsonl", "the file is empty"),
    "a list of nothing": ({"rows.json": b"[]"}, "rows.json", "the list is empty"),
    "a header alone": ({"rows.csv": b"instruction,output\n"}, "rows.csv", "there are no rows in it"),
    "a gz file of nothing": ({"rows.jsonl.gz": gzip.compress(b"")}, "rows.jsonl.gz", "the file is empty"),
    "a file of another kind": ({"rows.xlsx": b"PK"}, "rows.xlsx", r"a data set is read from .*; not from '\.xlsx'"),
    "a Parquet file that is none": ({"rows.parquet": b"PAR1"}, "rows.parquet", "not a Parquet file, or cut off"),
    "an Arrow file that is none": ({"rows.arrow": b"hello"}, "rows.arrow", "not a Arrow file, or cut off"),
    "an Arrow table of nothing": (
        {"rows.arrow": arrow(pa.table({"text": pa.array([], pa.string())}))},
        "rows.arrow",
        "there are no rows in it",
    ),
    "a directory without data": ({"data/README.md": b"# Data"}, "data", "no data file in this directory"),
    "a directory with an empty file": (
        {"data/a.jsonl": lines(GOOD["text"]), "data/b.jsonl": b""},
        "data/b.jsonl",
        "the file is empty",
    ),
}


class ReachedError(Exception):
    """A model was asked for."""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_directory: Callable[[str], Path]) -> Callable[..., str]:
    """Begins a run, with the files, up to where it would load a model; what it said until there."""
    monkeypatch.chdir(tmp_path)

    def reached(*_: Any) -> None:
        raise ReachedError

    monkeypatch.setattr("halfbyte.recipes.finetune.load_model", reached)
    monkeypatch.setattr("halfbyte.recipes.tokenizing.processes_of", lambda _: 1)
    monkeypatch.setattr("halfbyte.recipes.finetune.make_plan", lambda *_: None)  # reads the model's configuration

    def begin(files: dict[str, bytes], **settings: Any) -> str:
        for name, content in files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content)
        console = Console(file=io.StringIO(), width=1000)
        first = Path(next(iter(files), "rows.jsonl"))  # unless `settings` name another
        config = configure(model_directory("llama"), first, Path("out"), **{"data_cache_dir": "cache"} | settings)
        try:
            finetune(config, console)
        except ReachedError:
            return str(console.file.getvalue())  # type: ignore[attr-defined]
        finally:
            assert not Path("out").exists()
        raise AssertionError("a run came to its end without a model")

    return begin


def test_there_are_as_many_kinds_as_are_promised() -> None:
    assert len(KINDS) == len(LINES) + len(CONVERSATIONS) + len(TEXTS) + len(KINDS_OF_FILE) >= 40


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data_are_refused_with_file_and_line_before_a_model_is_loaded(load: Callable[..., str], kind: str) -> None:
    bad = KINDS[kind]
    with pytest.raises(HalfbyteError) as refused:
        load(bad.files, **bad.settings)
    sentence = str(refused.value)
    assert sentence.startswith(f"{bad.place}: ")
    assert re.search(bad.words, sentence), sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "cached"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_dropped_in_silence(
    load: Callable[..., str], kind: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = KINDS[kind]
    monkeypatch.setattr(cache, "IN_MEMORY_ROWS", 1 if large else 1000)
    if bad.rows is None:
        with pytest.raises(HalfbyteError):
            load(bad.files, **bad.settings, skip_bad_rows=1)
        return
    told = load(bad.files, **bad.settings, skip_bad_rows=1)
    name = bad.name or re.sub(r":\d+.*| \(row.*", "", bad.place)
    assert f"{name}: {bad.rows} rows, " in told
    (left_out,) = re.findall(r"note: 1 row is left out, as skip_bad_rows allows; the first is (.*)", told)
    assert left_out.startswith(f"{bad.place}: ")
    assert re.search(bad.words, left_out)
    assert Path("cache").exists() == large


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_data_are_refused_by_name(load: Callable[..., str], kind: str) -> None:
    files, place, words = FILES[kind]
    dataset = "data" if place.startswith("data") else place
    for skip_bad_rows in (0, 100):
        with pytest.raises(HalfbyteError, match=f"^{re.escape(place)}: .*{words}") as refused:
            load(files, dataset=dataset, skip_bad_rows=skip_bad_rows)
        assert "\n" not in str(refused.value)


def test_good_data_come_to_the_model(load: Callable[..., str]) -> None:
    """Or every refusal above could be of something else."""
    for layout, rows in GOOD.items():
        settings = {"columns": {"instruction": "question"}} if layout == "question" else {}
        told = load({f"{layout}.jsonl": lines(rows)}, **settings)
        assert f"{layout}.jsonl: 3 rows, " in told
        assert "left out" not in told
