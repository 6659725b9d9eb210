"""What the keys of a record mean: a table of the formats, how each is recognised, and how a record becomes a row.

    alpaca             {"instruction", "input", "output"}; `input` may be absent, null or empty
    messages           {"messages": [{"role", "content"}, ...]}, OpenAI's, with `tools` and `tool_calls`
    sharegpt           {"conversations": [{"from", "value"}, ...]}, with `system` and `tools`
    prompt-completion  {"prompt", "completion"}, texts or lists of messages; the completion is learned
    self-instruct      the same, of texts
    input-output       {"input", "output"}, texts; the output is learned
    hh-rlhf            {"chosen"}: "\\n\\nHuman: ...\\n\\nAssistant: ...", or a list of messages
    chip2              {"text"}: "<human>: ...\\n<bot>: ..."
    oasst1             {"text"}: "### Human: ...### Assistant: ...", or a tree of OpenAssistant's
    text               {"text"}: all of it is learned

What a set of the QLoRA paper trains on without a chat template is what the paper's own code made of it (arXiv
2305.14314, appendix B): of hh-rlhf and oasst1 the whole text, of the others the answer, and nothing added between the
prompt and the answer.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from halfbyte.data.conversations import check_conversation, read_messages, read_tools, read_turns
from halfbyte.data.fields import filled_field, kind, text_field
from halfbyte.data.rows import Alpaca, Piece, Row
from halfbyte.errors import HalfbyteError

_Fields = dict[str, Any]


class Format(NamedTuple):
    """A way to lay out a row."""

    read: Callable[[_Fields, str], Row]  # of a record and its source
    keys: tuple[str, ...] = ()  # a record that has them all is of this format; of none where there are none
    looks: Callable[[_Fields], bool] = lambda _: True  # what else such a record has
    reads: tuple[str, ...] = ()  # which of _ACTED_ON


# Columns that other trainers act on. Present and not empty, they cannot be passed over in silence.
_ACTED_ON = ("tools", "functions", "documents", "history", "system")


def detect_format(record: _Fields, source: str) -> str:
    """The format's name, by the keys of the first row.

    `text` stands beside other columns in many sets, as their rendering, so it decides where nothing else does.
    """
    found = [name for name, form in FORMATS.items() if form.keys and set(form.keys) <= record.keys()]
    if len(found) > 1 and set(found) & _BY_TEXT and set(found) - _BY_TEXT:
        found = [name for name in found if name not in _BY_TEXT]
    found = [name for name in found if FORMATS[name].looks(record)]
    if len(found) > 1 and "text" in found:
        found.remove("text")
    if "alpaca" in found and "input-output" in found:
        found.remove("input-output")
    if len(found) == 1:
        return found[0]
    if found:
        first, second = (f"'{FORMATS[name].keys[0]}'" for name in found[:2])
        raise HalfbyteError(f"{source}: has both {first} and {second}: say which to use with dataset_format")
    keys = ", ".join(sorted(repr(key) for key in record))[:200] or "none"
    raise HalfbyteError(
        f"{source}: the format cannot be told from the keys ({keys}): "
        "a row needs 'messages', or 'instruction' and 'output', or those of another dataset_format; "
        "columns says where they go by other names"
    )


def read_record(record: Any, source: str, dataset_format: str) -> Row:
    """The row that a record is in that format. Raises HalfbyteError where it is none."""
    form = FORMATS[dataset_format]
    for key in _ACTED_ON:
        if key not in form.reads and record.get(key):
            raise HalfbyteError(f"{source}: '{key}' is not something {dataset_format} rows are trained with: remove it")
    return form.read(record, source)


def _alpaca(record: _Fields, source: str) -> Row:
    instruction = filled_field(record, "instruction", source)
    output = filled_field(record, "output", source)
    context = "" if record.get("input") is None else text_field(record, "input", source)
    if not context.strip():
        context = ""
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction},
        {"role": "assistant", "content": output},
    ]
    return Row(messages, source, Alpaca(instruction, context, output))


def _messages(record: _Fields, source: str) -> Row:
    messages = read_messages(record, "messages", source)
    return Row(check_conversation(messages, source), source, tools=read_tools(record, source))


def _sharegpt(record: _Fields, source: str) -> Row:
    messages = read_turns(record, "conversations", source)
    return Row(check_conversation(messages, source), source, tools=read_tools(record, source))


def _prompt_completion(record: _Fields, source: str) -> Row:
    if isinstance(record.get("completion"), list) and "prompt" in record:
        return _continued_messages(record, "completion", source)
    if record.get("tools"):
        raise HalfbyteError(f"{source}: 'tools' beside texts: they need 'prompt' and 'completion' to be messages")
    return _text_pair(record, "prompt", "completion", source)


def _continued_messages(record: _Fields, key: str, source: str) -> Row:
    prompt, answer = read_messages(record, "prompt", source), read_messages(record, key, source)
    if any(message["role"] == "assistant" for message in prompt):
        raise HalfbyteError(
            f"{source}: an assistant turn in 'prompt' would be learned as well: make it one list under 'messages'"
        )
    return Row(check_conversation(prompt + answer, source), source, tools=read_tools(record, source))


def _text_pair(record: _Fields, prompt: str, answer: str, source: str) -> Row:
    given, learned = text_field(record, prompt, source), filled_field(record, answer, source)
    pieces = (Piece(given, False), Piece(learned, True))
    return Row([], source, pieces=pieces if given else pieces[1:])


def _self_instruct(record: _Fields, source: str) -> Row:
    return _text_pair(record, "prompt", "completion", source)


def _input_output(record: _Fields, source: str) -> Row:
    return _text_pair(record, "input", "output", source)


def _text(record: _Fields, source: str) -> Row:
    if _is_part_of_a_tree(record):
        raise HalfbyteError(
            f"{source}: this is one message of a tree, not a text to learn: use the file of whole trees, as oasst1"
        )
    return Row([], source, pieces=(Piece(filled_field(record, "text", source), True),))


_HH_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_CHIP2_SPEAKER = re.compile(r"(?:^|\n)<(human|bot)>: ?")
_USER_OR_ASSISTANT = {"Human": "user", "Assistant": "assistant", "human": "user", "bot": "assistant"}


def _spoken(text: str, speaker: re.Pattern[str], key: str, source: str) -> list[dict[str, Any]]:
    """The turns of a text in which marks say who speaks, as messages."""
    before, *parts = speaker.split(text)
    if not parts or before.strip():
        what = "begins with no" if parts else "has no"
        raise HalfbyteError(f"{source}: '{key}' {what} mark of who speaks, such as {_EXAMPLE[speaker]!r}")
    messages = [
        {"role": _USER_OR_ASSISTANT[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            raise HalfbyteError(f"{source}: turn {index + 1} of '{key}', the assistant's, is empty: remove the row")
    return check_conversation(messages, source)


_EXAMPLE = {_HH_SPEAKER: "\n\nHuman: ", _CHIP2_SPEAKER: "<human>: "}


def _hh_rlhf(record: _Fields, source: str) -> Row:
    if isinstance(record.get("chosen"), list):
        if isinstance(record.get("prompt"), list):
            return _continued_messages(record, "chosen", source)
        messages = read_messages(record, "chosen", source)
        return Row(check_conversation(messages, source), source, tools=read_tools(record, source))
    chosen = filled_field(record, "chosen", source)
    if record.get("tools"):
        raise HalfbyteError(f"{source}: 'tools' beside a text: they need 'chosen' to be messages")
    if record.get("prompt") and not _HH_SPEAKER.match(chosen):
        raise HalfbyteError(
            f"{source}: 'chosen' goes on from 'prompt': use dataset_format prompt-completion, with columns that say "
            "completion is chosen"
        )
    messages = _spoken(chosen, _HH_SPEAKER, "chosen", source)
    messages = [message | {"content": message["content"].strip()} for message in messages]
    return Row(messages, source, pieces=(Piece(chosen, True),))


def _chip2(record: _Fields, source: str) -> Row:
    messages = _spoken(filled_field(record, "text", source), _CHIP2_SPEAKER, "text", source)
    pieces = tuple(Piece(message["content"], message["role"] == "assistant") for message in messages)
    return Row(messages, source, pieces=pieces)


def _oasst1(record: _Fields, source: str) -> Row:
    if "prompt" not in record:
        return _text(record, source)
    turns = _best_path(record["prompt"], source)
    text = "".join(f"### {who}: {said}" for who, said in turns)
    return Row([], source, pieces=(Piece(text, True),))


_OASST_ROLES = {"prompter": "Human", "assistant": "Assistant"}


def _best_path(node: Any, source: str) -> list[tuple[str, str]]:
    """Who said what, from the tree's prompt along the reply that people ranked first, up to the last answer."""
    turns: list[tuple[str, str]] = []
    while node is not None:
        where = f"{source}: message {len(turns) + 1} of the tree"
        if not isinstance(node, dict):
            raise HalfbyteError(f"{where} must be an object with 'text' and 'role', this is {kind(node)}")
        role, said = text_field(node, "role", where), filled_field(node, "text", where)
        if role not in _OASST_ROLES:
            raise HalfbyteError(f"{where}: the role '{role[:40]}' is not known: use {', '.join(_OASST_ROLES)}")
        turns.append((_OASST_ROLES[role], said))
        replies = node.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise HalfbyteError(f"{where}: 'replies' must be a list of messages")
        # The first of those that are ranked alike; one without a rank after those with one.
        node = min(replies, key=_rank, default=None)
    while turns and turns[-1][0] == "Human":
        turns.pop()
    if not turns:
        raise HalfbyteError(f"{source}: nothing in this tree is an answer: remove it")
    return turns


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) and rank == rank else float("inf")


def _is_part_of_a_tree(record: _Fields) -> bool:
    return "message_tree_id" in record and "parent_id" in record


def _begins(speaker: re.Pattern[str]) -> Callable[[_Fields], bool]:
    return lambda record: isinstance(record.get("text"), str) and speaker.match(record["text"]) is not None


FORMATS: dict[str, Format] = {
    "alpaca": Format(_alpaca, ("instruction",)),
    "messages": Format(_messages, ("messages",), reads=("tools",)),
    "sharegpt": Format(_sharegpt, ("conversations",), reads=("tools", "system")),
    "prompt-completion": Format(_prompt_completion, ("prompt", "completion"), reads=("tools",)),
    "self-instruct": Format(_self_instruct),  # prompt-completion by another name
    "input-output": Format(_input_output, ("input", "output")),
    "hh-rlhf": Format(_hh_rlhf, ("chosen",), reads=("tools",)),
    "chip2": Format(_chip2, ("text",), _begins(_CHIP2_SPEAKER)),
    "oasst1": Format(_oasst1, ("message_tree_id", "prompt")),
    "text": Format(_text, ("text",)),
}
_BY_TEXT = {"chip2", "text"}
