"""The formats: each recognised by its keys, each record made into the row that users of the name expect."""

import json
from pathlib import Path

import pytest

from halfbyte.data import Alpaca, Piece, Row, read_rows
from halfbyte.data.formats import FORMATS
from halfbyte.errors import HalfbyteError

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
HUMAN, GPT = {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}
SCHEMA = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CALL_AS_TEXT = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1"}
HH = "\n\nHuman: hello\n\nAssistant: hi"
TREE = {
    "message_tree_id": "m",
    "prompt": {
        "role": "prompter",
        "text": "hello",
        "replies": [
            {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
            {
                "role": "assistant",
                "text": "hi",
                "rank": 0,
                "replies": [{"role": "prompter", "text": "bye?", "rank": None, "replies": []}],
            },
            {"role": "assistant", "text": "unranked"},
        ],
    },
}


def read(tmp_path: Path, record: object, dataset_format: str = "auto") -> Row:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (row,) = read_rows(path, dataset_format)
    assert row.source == f"{path}:1"
    return row


def texts(*pieces: tuple[str, bool]) -> tuple[Piece, ...]:
    return tuple(Piece(*piece) for piece in pieces)


def asking_and(*turns: object) -> list[object]:
    return [USER, *turns]


# A record; the formats it may be read as, the one that "auto" finds first; what the row holds beside the source.
GOOD = [
    (
        {"instruction": "add", "input": "1 2", "output": "3", "text": "rendered", "id": 7},
        ["alpaca"],
        {
            "messages": [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}],
            "alpaca": Alpaca("add", "1 2", "3"),
        },
    ),
    ({"messages": [SYSTEM, USER, ASSISTANT]}, ["messages"], {"messages": [SYSTEM, USER, ASSISTANT]}),
    ({"messages": json.dumps([USER, ASSISTANT])}, ["messages"], {"messages": [USER, ASSISTANT]}),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
                ASSISTANT,
            ]
        },
        ["messages"],
        {"messages": [USER, ASSISTANT]},
    ),
    (
        {
            "messages": asking_and(
                {"role": "assistant", "content": None, "tool_calls": [CALL_AS_TEXT]}, RESULT, ASSISTANT
            ),
            "tools": [TOOL],
        },
        ["messages"],
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"id": "c1"} | CALL]},
                RESULT,
                ASSISTANT,
            ],
            "tools": [TOOL],
        },
    ),
    (
        {
            "messages": asking_and({"role": "assistant", "tool_calls": [CALL["function"]]}),
            "tools": json.dumps([SCHEMA]),
        },
        ["messages"],
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]},
    ),
    (
        {"messages": asking_and(ASSISTANT | {"reasoning_content": "hm", "name": "", "tool_calls": []}), "tools": []},
        ["messages"],
        {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]},
    ),
    ({"conversations": [HUMAN, GPT], "system": "be brief"}, ["sharegpt"], {"messages": [SYSTEM, USER, ASSISTANT]}),
    (
        {"conversations": [{"from": "system", "value": "be brief"}, HUMAN, GPT]},
        ["sharegpt"],
        {"messages": [SYSTEM, USER, ASSISTANT]},
    ),
    ({"conversations": [USER, ASSISTANT]}, ["sharegpt"], {"messages": [USER, ASSISTANT]}),
    (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": null}}'},
                {"from": "observation", "value": "3"},
                GPT,
            ],
            "tools": json.dumps([SCHEMA]),
        },
        ["sharegpt"],
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "3"},
                ASSISTANT,
            ],
            "tools": [TOOL],
        },
    ),
    (
        {"prompt": "hello ", "completion": "hi"},
        ["prompt-completion", "self-instruct"],
        {"pieces": texts(("hello ", False), ("hi", True))},
    ),
    ({"prompt": "", "completion": "hi"}, ["prompt-completion"], {"pieces": texts(("hi", True))}),
    (
        {"prompt": [SYSTEM, USER], "completion": [ASSISTANT], "tools": [TOOL]},
        ["prompt-completion"],
        {"messages": [SYSTEM, USER, ASSISTANT], "tools": [TOOL]},
    ),
    ({"input": "hello", "output": " hi"}, ["input-output"], {"pieces": texts(("hello", False), (" hi", True))}),
    (
        {"chosen": HH, "rejected": "\n\nHuman: hello\n\nAssistant: no"},
        ["hh-rlhf"],
        {"messages": [USER, ASSISTANT], "pieces": texts((HH, True))},
    ),
    ({"chosen": [USER, ASSISTANT], "rejected": [], "prompt": "hello"}, ["hh-rlhf"], {"messages": [USER, ASSISTANT]}),
    ({"prompt": [USER], "chosen": [ASSISTANT]}, ["hh-rlhf"], {"messages": [USER, ASSISTANT]}),
    (
        {"text": "<human>: hello\n<bot>: hi", "metadata": {}},
        ["chip2"],
        {"messages": [USER, ASSISTANT], "pieces": texts(("hello", False), ("hi", True))},
    ),
    (
        {"text": "<human>: hello\n<bot>: hi\n<human>: hello\n<bot>: hi"},
        ["chip2"],
        {"messages": [USER, ASSISTANT] * 2, "pieces": texts(("hello", False), ("hi", True)) * 2},
    ),
    (
        {"text": "### Human: hello### Assistant: hi"},
        ["text", "oasst1"],
        {"pieces": texts(("### Human: hello### Assistant: hi", True))},
    ),
    (TREE, ["oasst1"], {"pieces": texts(("### Human: hello### Assistant: hi", True))}),
    ({"text": " as it is\n", "meta": {"a": 1}}, ["text"], {"pieces": texts((" as it is\n", True))}),
]
GOOD = [
    pytest.param(record, name, found == 0, wanted, id=f"{name}-{number}")
    for number, (record, names, wanted) in enumerate(GOOD)
    for found, name in enumerate(names)
]


@pytest.mark.parametrize(("record", "dataset_format", "is_found", "wanted"), GOOD)
def test_a_record_becomes_the_row_that_its_format_says(tmp_path, record, dataset_format, is_found, wanted):
    row = read(tmp_path, record, dataset_format)
    nothing = {"messages": [], "alpaca": None, "pieces": None, "tools": None}
    assert {name: getattr(row, name) for name in nothing} == nothing | wanted
    if is_found:
        assert read(tmp_path, record) == row


def test_every_format_is_in_the_table():
    assert {parameters.values[1] for parameters in GOOD} == set(FORMATS)


AMBIGUOUS = [
    ({"instruction": "a", "output": "b", "messages": []}, "has both 'instruction' and 'messages'"),
    ({"messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT]}, "has both 'messages' and 'chosen'"),
    ({"question": "a", "answer": "b"}, r"cannot be told from the keys \('answer', 'question'\).*columns"),
]


@pytest.mark.parametrize(("record", "message"), AMBIGUOUS)
def test_what_cannot_be_told_is_asked(tmp_path, record, message):
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:1: .*" + message):
        read(tmp_path, record)


def calling(**call: object) -> dict[str, object]:
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}


BAD = [
    ("messages", {"messages": "[not json"}, "'messages' must be a list, this is text"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]},
        "'image_url'.*on text",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": ["hi"]}]},
        r"content\[0\] must be a part .* is text",
    ),
    ("messages", {"messages": [USER | {"tool_calls": [CALL]}, ASSISTANT]}, "only the assistant calls tools"),
    (
        "messages",
        {"messages": [USER, ASSISTANT | {"tool_calls": {"a": 1}}]},
        "'tool_calls' must be a list, .* an object",
    ),
    ("messages", {"messages": [USER, ASSISTANT | {"tool_calls": ["add"]}]}, r"tool_calls\[0\] must be an object"),
    ("messages", calling(function={"arguments": {}}), r"tool_calls\[0\]: the key 'name' is missing"),
    ("messages", calling(function={"name": " "}), r"tool_calls\[0\]: 'name' is empty"),
    ("messages", calling(function="add"), r"tool_calls\[0\]: 'function' must be an object, this is text"),
    ("messages", calling(name="add", arguments="1, 2"), "'arguments' must be an object or its JSON text, this is text"),
    ("messages", calling(name="add", arguments=[1]), "'arguments' must be an object or its JSON text, this is a list"),
    ("messages", calling(name="add", arguments={"a": ["\ud83d"]}), "half of a surrogate pair"),
    ("messages", calling(name="add", id=7), "'id' must be text, this is a number"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": []}]},
        "the assistant turn is empty",
    ),
    ("messages", {"messages": [USER, ASSISTANT | {"function_call": CALL}]}, "'function_call' is not something"),
    (
        "messages",
        {"messages": [USER, ASSISTANT | {"name": 3}]},
        r"messages\[1\]: 'name' must be text, this is a number",
    ),
    ("messages", {"messages": [USER, ASSISTANT], "tools": "add"}, "'tools' must be a list, this is text"),
    ("messages", {"messages": [USER, ASSISTANT], "tools": [3]}, r"tools\[0\] must be an object"),
    ("messages", {"messages": [USER, ASSISTANT], "tools": [{}]}, r"tools\[0\]: the key 'name' is missing"),
    (
        "messages",
        {"messages": [USER, ASSISTANT], "tools": [{"function": 3}]},
        r"tools\[0\]: 'function' must be an object",
    ),
    ("messages", {"messages": [USER, ASSISTANT], "documents": ["x"]}, "'documents' is not something messages rows"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "alien", "value": "x"}]}, r"conversations\[1\]: 'from' is 'alien'"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "gpt"}]}, r"conversations\[1\]: the key 'value' is missing"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "'value' must be text, this is null"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "the assistant turn is empty"),
    ("sharegpt", {"conversations": [HUMAN, GPT | {"weight": 0}]}, "'weight' is not something this version trains on"),
    ("sharegpt", {"conversations": [GPT, HUMAN]}, "the first message is an assistant turn"),
    ("sharegpt", {"conversations": [HUMAN]}, "no assistant turn"),
    ("sharegpt", {"conversations": {"from": [], "value": []}}, "'conversations' must be a list, this is an object"),
    ("sharegpt", {"conversations": [HUMAN, "hi"]}, r"conversations\[1\] must be an object with 'from'"),
    (
        "sharegpt",
        {"conversations": [HUMAN, {"from": "function_call", "value": "add()"}]},
        "must be an object with 'function'",
    ),
    (
        "sharegpt",
        {"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]},
        "the list of function calls is empty",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "x"}, HUMAN, GPT], "system": "y"},
        "a system turn and 'system'",
    ),
    ("prompt-completion", {"prompt": "x"}, "the key 'completion' is missing"),
    ("prompt-completion", {"completion": "x"}, "the key 'prompt' is missing"),
    ("prompt-completion", {"prompt": "x", "completion": " "}, "'completion' is empty"),
    ("prompt-completion", {"prompt": 3, "completion": "x"}, "'prompt' must be text, this is a number"),
    ("prompt-completion", {"prompt": [USER], "completion": "x"}, "'prompt' must be text, this is a list"),
    ("prompt-completion", {"prompt": "x", "completion": [ASSISTANT]}, "'prompt' must be a list, this is text"),
    ("prompt-completion", {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}, "would be learned as well"),
    ("prompt-completion", {"prompt": [USER], "completion": [USER]}, "no assistant turn"),
    ("prompt-completion", {"prompt": "x", "completion": "y", "tools": [TOOL]}, "'tools' beside texts"),
    ("self-instruct", {"prompt": "x", "completion": None}, "'completion' must be text, this is null"),
    ("input-output", {"input": "x", "output": ""}, "'output' is empty"),
    ("input-output", {"output": "x"}, "the key 'input' is missing"),
    ("hh-rlhf", {"chosen": "hello"}, r"'chosen' has no mark of who speaks, such as '\\n\\nHuman: '"),
    ("hh-rlhf", {"chosen": "x" + HH}, "'chosen' begins with no mark"),
    ("hh-rlhf", {"chosen": "\n\nHuman: hello\n\nAssistant: "}, "turn 2 of 'chosen', the assistant's, is empty"),
    ("hh-rlhf", {"chosen": "\n\nAssistant: hi"}, "the first message is an assistant turn"),
    (
        "hh-rlhf",
        {"chosen": "hi", "prompt": "hello"},
        "'chosen' goes on from 'prompt': use dataset_format prompt-completion",
    ),
    ("hh-rlhf", {"chosen": HH, "tools": [TOOL]}, "'tools' beside a text"),
    ("hh-rlhf", {"chosen": 3}, "'chosen' must be text, this is a number"),
    ("chip2", {"text": "<human>: hello"}, "no assistant turn"),
    ("chip2", {"text": "<human>: hello\n<bot>:"}, "turn 2 of 'text', the assistant's, is empty"),
    ("chip2", {"text": "hello"}, "'text' has no mark of who speaks"),
    ("oasst1", {"message_tree_id": "m", "prompt": None}, "nothing in this tree is an answer"),
    ("oasst1", {"message_tree_id": "m", "prompt": "x"}, "message 1 of the tree must be an object"),
    ("oasst1", {"message_tree_id": "m", "prompt": {"text": "x"}}, "message 1 of the tree: the key 'role' is missing"),
    ("oasst1", {"message_tree_id": "m", "prompt": {"text": "x", "role": "king"}}, "the role 'king' is not known"),
    (
        "oasst1",
        {"message_tree_id": "m", "prompt": {"text": "x", "role": "prompter"}},
        "nothing in this tree is an answer",
    ),
    ("oasst1", {"prompt": {"text": "x", "role": "prompter", "replies": [3]}}, "'replies' must be a list of messages"),
    ("text", {"text": ""}, "'text' is empty"),
    ("text", {"text": None}, "'text' must be text, this is null"),
    ("text", {"text": "\udcff"}, "'text' holds half of a surrogate"),
    ("text", {"text": "x", "message_tree_id": "m", "parent_id": "p"}, "one message of a tree"),
]


@pytest.mark.parametrize(("dataset_format", "record", "message"), BAD)
def test_a_bad_record_is_an_error_with_file_line_and_key(tmp_path, dataset_format, record, message):
    with pytest.raises(HalfbyteError, match=r"rows\.jsonl:1: .*" + message):
        read(tmp_path, record, dataset_format)


def test_a_tree_of_ten_thousand_replies_is_walked_without_recursion(tmp_path):
    node: dict[str, object] = {"role": "assistant", "text": "end"}
    from halfbyte.data.formats import read_record

    for number in range(10_000):
        node = {"role": "prompter" if number % 2 == 0 else "assistant", "text": "x", "replies": [node]}
    node = {"role": "prompter", "text": "x", "replies": [node]}
    row = read_record({"message_tree_id": "m", "prompt": node}, "a:1", "oasst1")
    assert row.pieces[0].text.endswith("### Assistant: end")
