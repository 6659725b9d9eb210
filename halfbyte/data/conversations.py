"""Conversations: OpenAI's messages and ShareGPT's turns, with the tools that were called in them.

Both become messages in the one form that chat templates take (`Row.messages`). A key that would change what is learned
and that is not read here is an error, unless it is empty: passing over it would teach something else.
"""

from typing import Any

from halfbyte.data.fields import check_texts, from_json_text, kind, list_field, text_field
from halfbyte.errors import HalfbyteError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OPTIONAL_TEXTS = ("name", "tool_call_id", "reasoning_content")
_SPEAKERS = {  # ShareGPT's, and those of its descendants
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def read_messages(record: dict[str, Any], key: str, source: str) -> list[Message]:
    """The messages of `record[key]`, each by itself; whether they make a conversation is for check_conversation."""
    turns = list_field(record, key, source)
    return [_message(turn, f"{source}: {key}[{index}]") for index, turn in enumerate(turns)]


def read_turns(record: dict[str, Any], key: str, source: str) -> list[Message]:
    """ShareGPT's turns, `{"from", "value"}`; a column `system` is the system message."""
    turns = list_field(record, key, source)
    messages = [_turn(turn, f"{source}: {key}[{index}]") for index, turn in enumerate(turns)]
    if record.get("system"):
        if messages and messages[0]["role"] == "system":
            raise HalfbyteError(f"{source}: there is a system turn and 'system' beside it: remove one of them")
        messages.insert(0, {"role": "system", "content": text_field(record, "system", source)})
    return messages


def check_conversation(messages: list[Message], source: str) -> list[Message]:
    """The messages again. Raises HalfbyteError where nothing could be learned from them."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise HalfbyteError(f"{source}: there is no assistant turn, so nothing to learn: add one or remove the row")
    if roles[0] == "assistant":
        raise HalfbyteError(f"{source}: the first message is an assistant turn: put what it answers before it")
    return messages


def read_tools(record: dict[str, Any], source: str) -> list[dict[str, Any]] | None:
    """The schemas of `record["tools"]`, each `{"type": "function", "function": {...}}`; None where there are none."""
    if not record.get("tools"):
        return None
    tools = list_field(record, "tools", source)
    return [_tool(tool, f"{source}: tools[{index}]") for index, tool in enumerate(tools)] or None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    tool = from_json_text(tool)
    if not isinstance(tool, dict):
        raise HalfbyteError(f"{where} must be an object that describes a function, this is {kind(tool)}")
    schema = tool if "function" in tool else {"type": "function", "function": tool}
    if not isinstance(schema["function"], dict):
        raise HalfbyteError(f"{where}: 'function' must be an object, this is {kind(schema['function'])}")
    if not text_field(schema["function"], "name", where).strip():
        raise HalfbyteError(f"{where}: 'name' is empty: a tool is called by its name")
    check_texts(schema, where)
    return schema


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise HalfbyteError(f"{where} must be an object with 'role' and 'content', this is {kind(turn)}")
    role = text_field(turn, "role", where)
    if role not in ROLES:
        raise HalfbyteError(f"{where}: the role '{role[:40]}' is not known: use {', '.join(ROLES)}")
    calls = turn.get("tool_calls")
    message: Message = {"role": role, "content": _content(turn, where, may_be_absent=bool(calls))}
    if calls:
        if role != "assistant":
            raise HalfbyteError(f"{where}: 'tool_calls' in a turn of the role '{role}': only the assistant calls tools")
        calls = list_field(turn, "tool_calls", where)
        message["tool_calls"] = [_call(call, f"{where}: tool_calls[{index}]") for index, call in enumerate(calls)]
    for key in _OPTIONAL_TEXTS:
        if turn.get(key):
            message[key] = text_field(turn, key, where)
    _check_extra(turn, ("role", "content", "tool_calls", *_OPTIONAL_TEXTS), where)
    _check_answer(message, where)
    return message


def _content(turn: Message, where: str, may_be_absent: bool) -> str:
    value = turn.get("content")
    if value is None and may_be_absent:
        return ""  # how OpenAI writes a turn that only calls tools
    if not isinstance(value, list):
        return text_field(turn, "content", where)
    texts = []
    for index, part in enumerate(value):
        part_of = f"{where}: content[{index}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            what = f"of the type {str(part.get('type'))[:40]!r}" if isinstance(part, dict) else kind(part)
            raise HalfbyteError(f"{part_of} must be a part of the type 'text', this is {what}: halfbyte trains on text")
        texts.append(text_field(part, "text", part_of))
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "arguments"}}`, with its `id` if it has one.

    OpenAI writes the arguments as JSON text; chat templates, which turn them into JSON themselves, want the object.
    """
    call = from_json_text(call)
    if not isinstance(call, dict):
        raise HalfbyteError(f"{where} must be an object with 'function', this is {kind(call)}")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise HalfbyteError(f"{where}: 'function' must be an object, this is {kind(function)}")
    name = text_field(function, "name", where)
    if not name.strip():
        raise HalfbyteError(f"{where}: 'name' is empty: a tool is called by its name")
    arguments = function.get("arguments")
    arguments = {} if arguments is None or arguments == "" else from_json_text(arguments)
    if not isinstance(arguments, dict):
        raise HalfbyteError(f"{where}: 'arguments' must be an object or its JSON text, this is {kind(arguments)}")
    check_texts(arguments, where)
    identity = {"id": text_field(call, "id", where)} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _turn(turn: Any, where: str) -> Message:
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return _message(turn, where)  # the name of the one format, the form of the other
    if not isinstance(turn, dict):
        raise HalfbyteError(f"{where} must be an object with 'from' and 'value', this is {kind(turn)}")
    speaker, value = text_field(turn, "from", where), text_field(turn, "value", where)
    role = _SPEAKERS.get(speaker)
    if role is None:
        raise HalfbyteError(f"{where}: 'from' is '{speaker[:40]}', which is not known: use {', '.join(_SPEAKERS)}")
    _check_extra(turn, ("from", "value"), where)
    if speaker == "function_call":
        called = from_json_text(value)
        calls = called if isinstance(called, list) else [called]
        if not calls:
            raise HalfbyteError(f"{where}: the list of function calls is empty")
        return {"role": role, "content": "", "tool_calls": [_call(call, where) for call in calls]}
    message = {"role": role, "content": value}
    _check_answer(message, where)
    return message


def _check_extra(turn: Message, known: tuple[str, ...], where: str) -> None:
    # weight, function_call, thinking, ...: each would change what is learned. Empty, it changes nothing; 0 is a weight.
    extra = sorted(key for key, value in turn.items() if key not in known and value not in (None, "", [], {}))
    if extra:
        raise HalfbyteError(f"{where}: '{extra[0][:40]}' is not something this version trains on: remove it")


def _check_answer(message: Message, where: str) -> None:
    if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise HalfbyteError(f"{where}: the assistant turn is empty: fill it or remove the row")
