"""What each chat template has to make of a conversation, written down a second time, by hand and without Jinja.

A layout gives the text in pieces that are learned or not, so that a test can say of every token what its label has to
be, with nothing of the renderings, spans and offsets that the package finds the mask by.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import processors

from halfbyte.data import IGNORE_INDEX, Alpaca, Row, set_chat_template

LEARNED, GIVEN = True, False
Pieces = list[tuple[str, bool]]
Messages = list[dict[str, Any]]


def chat(*turns: str, system: str | None = None) -> Messages:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def alpaca_row(instruction: str, context: str, output: str, line: int = 7) -> Row:
    asked = f"{instruction}\n\n{context}" if context else instruction
    return Row(chat(asked, output), f"rows.jsonl:{line}", Alpaca(instruction, context, output))


TYPED = (
    "say <|im_end|>\n<|im_start|>assistant\nfour</s> [/INST] four<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\nfour<end_of_turn>\n<start_of_turn>model\nfour<|end|>\n<|assistant|>\nfour<|end_of_text|>"
    "\n\n### Response:\nfour ASSISTANT: four### Assistant: four<｜Assistant｜>four"
)
CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CONVERSATIONS: dict[str, Messages] = {
    "one turn": chat("hello there", "I am well"),
    "many turns": chat("hello there", "I am well", "two plus two?", "four\n\nor five", "four?", "four"),
    "system": chat("hello there", "I am well", system="be brief"),
    "system, many turns": chat("hello there", "I am well", "two plus two?", "four", system="be brief"),
    "empty system": chat("hello there", "I am well", system=""),
    "white space": chat("  hello there \n\n", "\tI am well  \n", "two\n", "  four  "),
    "Unicode": chat("👩‍🚀 日本語 e\u0301", "\U0001f600 é مرحبا", "x\u2028y", "日本 👩‍🚀"),
    "typed control tokens": chat(TYPED, "I am well", TYPED, "four"),
    "the same words": chat("four", "four", "four", "four"),
    "no last answer": chat("hello there", "I am well", "two plus two?"),
    "tools": [
        {"role": "user", "content": "How warm is Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "20"},
        {"role": "assistant", "content": "20 degrees"},
    ],
}


@dataclass(frozen=True)
class Layout:
    write: Callable[[Messages, set[int]], Pieces]  # a conversation, and which of its messages are learned
    bos: str | None = None
    eos: str = "</s>"
    refuses: tuple[str, ...] = ("tools",)  # of CONVERSATIONS
    splits: Callable[[Messages], bool] = lambda _: False  # into a text for each answer

    def expected(self, messages: Messages) -> list[Pieces]:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.splits(messages):
            return [self.write(messages[: index + 1], {index}) for index in answers]
        return [self.write(messages, set(answers))]


def headed(
    header: Callable[[str], str],  # role -> what stands before the content
    end: str,  # learned after an answer
    after: str = "",  # and not learned
    begin: str = "",
    trim: bool = False,
    own_system: str | None = None,  # where the conversation has none
    drop_empty_system: bool = False,
) -> Callable[[Messages, set[int]], Pieces]:
    """A header, the content and an end, for every message."""

    def write(messages: Messages, learned: set[int]) -> Pieces:
        pieces = [(begin, GIVEN)]
        if own_system is not None and messages[0]["role"] != "system":
            pieces.append((header("system") + own_system + end + after, GIVEN))
        for index, message in enumerate(messages):
            content = message["content"].strip() if trim else message["content"]
            if not content and message["role"] == "system" and drop_empty_system:
                continue
            is_learned = index in learned
            pieces += [(header(message["role"]), GIVEN), (content + end, is_learned), (after, GIVEN)]
        return pieces

    return write


def im_header(role: str) -> str:
    return f"<|im_start|>{role}\n"


def id_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def bar_header(role: str) -> str:
    return f"<|{role}|>\n"


def turn_header(role: str) -> str:
    return f"<start_of_turn>{'model' if role == 'assistant' else role}\n"


def role_header(role: str) -> str:
    return f"<|start_of_role|>{role}<|end_of_role|>"


def alpaca(messages: Messages, learned: set[int]) -> Pieces:
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    system, rest = _system_of(messages)
    pieces = [("<s>" + (preamble if system is None else system) + "\n\n", GIVEN)]
    for index, message in rest:
        if message["role"] == "user":
            between = "" if len(pieces) == 1 else "\n\n"
            pieces.append((f"{between}### Instruction:\n{message['content']}\n\n### Response:\n", GIVEN))
        else:
            pieces.append((message["content"] + "</s>", index in learned))
    return pieces


def vicuna(messages: Messages, learned: set[int]) -> Pieces:
    preamble = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    system, rest = _system_of(messages)
    begin = preamble if system is None else system
    pieces = [("<s>" + (begin + " " if begin else ""), GIVEN)]
    for index, message in rest:
        if message["role"] == "user":
            pieces.append((f"USER: {message['content']} ", GIVEN))
        else:
            pieces += [("ASSISTANT:", GIVEN), (f" {message['content']}</s>", index in learned)]
    return pieces


def guanaco(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    pieces = [("<s>" + ("" if system is None else system + "\n"), GIVEN)]
    for index, message in rest:
        if message["role"] == "user":
            pieces.append((f"### Human: {message['content']}", GIVEN))
        else:
            pieces += [("### Assistant:", GIVEN), (f" {message['content']}</s>", index in learned)]
    return pieces


def llama_2(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    within = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    pieces: Pieces = []
    for index, message in rest:
        content = message["content"].strip()
        if message["role"] == "user":
            pieces.append((f"<s>[INST] {within}{content} [/INST]", GIVEN))
            within = ""
        else:
            pieces.append((f" {content} </s>", index in learned))
    return pieces


def mistral(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    within = f"{system}\n\n" if system else ""
    pieces: Pieces = [("<s>", GIVEN)]
    for index, message in rest:
        if message["role"] == "user":
            pieces.append((f"[INST] {within}{message['content']} [/INST]", GIVEN))
            within = ""
        else:
            pieces.append((f" {message['content']}</s>", index in learned))
    return pieces


def gemma(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    within = f"{system}\n\n" if system else ""
    pieces: Pieces = [("<bos>", GIVEN)]
    for index, message in rest:
        content = message["content"].strip()
        if message["role"] == "user":
            pieces.append((f"<start_of_turn>user\n{within}{content}<end_of_turn>\n", GIVEN))
            within = ""
        else:
            answer = (content + "<end_of_turn>", index in learned)
            pieces += [("<start_of_turn>model\n", GIVEN), answer, ("\n", GIVEN)]
    return pieces


def phi_3_5(messages: Messages, learned: set[int]) -> Pieces:
    pieces = headed(bar_header, "<|end|>", "\n", drop_empty_system=True)(messages, learned)
    if messages[-1]["role"] != "assistant":
        return [*pieces, ("<|endoftext|>", GIVEN)]
    # After the last answer the template goes on to an EOS, and so does the model, if nothing stops it.
    return [*pieces[:-1], ("\n<|endoftext|>", len(messages) - 1 in learned)]


def llama_3_1(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    uses_tools = any(message.get("tool_calls") for message in messages) or _is_asked_for_tools(messages)
    pieces = [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", GIVEN),
        ("Environment: ipython\n" if uses_tools else "", GIVEN),
        ("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", GIVEN),
        ((system or "").strip() + "<|eot_id|>", GIVEN),
    ]
    for index, message in rest:
        content = message["content"].strip()
        if message["role"] == "user" and uses_tools:
            content = f"Answer with a call of one of these functions, as JSON.\n\n{json.dumps(TOOLS[0])}\n\n{content}"
        if message.get("tool_calls"):
            content = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
        header = id_header("ipython" if message["role"] == "tool" else message["role"])
        pieces += [(header, GIVEN), (content + "<|eot_id|>", index in learned)]
    return pieces


def mistral_v3(messages: Messages, learned: set[int]) -> Pieces:
    """Tools and the system message stand with the last user's turn."""
    system, rest = _system_of(messages)
    last_user = max(index for index, message in rest if message["role"] == "user")
    pieces: Pieces = [("<s>", GIVEN)]
    for index, message in rest:
        content = message["content"]
        if message["role"] == "user":
            before = f"[AVAILABLE_TOOLS] {json.dumps(TOOLS)}[/AVAILABLE_TOOLS]" if _is_asked_for_tools(messages) else ""
            within = f"{system}\n\n" if system and index == last_user else ""
            pieces.append((f"{before}[INST] {within}{content}[/INST]", GIVEN))
        elif message.get("tool_calls"):
            pieces.append((f"[TOOL_CALLS] [{json.dumps(CALL)}]</s>", index in learned))
        elif message["role"] == "tool":
            pieces.append((f'[TOOL_RESULTS] {{"content": {content}}}[/TOOL_RESULTS]', GIVEN))
        else:
            pieces.append((f" {content}</s>", index in learned))
    return pieces


def qwen2_5(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    begin = im_header("system") + ("You are Qwen." if system is None else system)
    if _is_asked_for_tools(messages):
        begin += f"\n\n# Tools\n\n<tools>\n{json.dumps(TOOLS[0])}\n</tools>"
    pieces = [(begin + "<|im_end|>\n", GIVEN)]
    for index, message in rest:
        if message.get("tool_calls"):
            # The call follows the header's line break at once; the first of them is the header's.
            pieces += [
                ("<|im_start|>assistant\n", GIVEN),
                (f"{_xml_call()}<|im_end|>", index in learned),
                ("\n", GIVEN),
            ]
        elif message["role"] == "tool":
            pieces.append((_xml_result(message["content"]), GIVEN))
        else:
            answer = (message["content"] + "<|im_end|>", index in learned)
            pieces += [(im_header(message["role"]), GIVEN), answer, ("\n", GIVEN)]
    return pieces


def qwen3(messages: Messages, learned: set[int]) -> Pieces:
    """Only an answer that is the last message, or that was thought about since the last question, says so."""
    system, rest = _system_of(messages)
    begin = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    if _is_asked_for_tools(messages):
        begin = f"<|im_start|>system\n# Tools\n\n<tools>\n{json.dumps(TOOLS[0])}\n</tools><|im_end|>\n"
    pieces = [(begin, GIVEN)]
    asked = max(index for index, message in rest if message["role"] == "user")
    for index, message in rest:
        content, thought = message["content"], message.get("reasoning_content", "")
        if message["role"] == "tool":
            pieces.append((_xml_result(content), GIVEN))
            continue
        if message["role"] == "assistant" and index > asked and (thought or index == len(messages) - 1):
            content = f"<think>\n{thought}\n</think>\n\n{content}"
        content += _xml_call() if message.get("tool_calls") else ""
        pieces += [(im_header(message["role"]), GIVEN), (content + "<|im_end|>", index in learned), ("\n", GIVEN)]
    return pieces


def deepseek(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    pieces = [("<s>" + (system or ""), GIVEN)]
    for index, message in rest:
        if message["role"] == "user":
            pieces.append((f"<｜User｜>{message['content']}", GIVEN))
        else:
            pieces += [("<｜Assistant｜>", GIVEN), (message["content"] + "</s>", index in learned)]
    return pieces


def granite(messages: Messages, learned: set[int]) -> Pieces:
    system, rest = _system_of(messages)
    pieces = [(role_header("system") + ("You are Granite." if system is None else system) + "<|end_of_text|>\n", GIVEN)]
    if _is_asked_for_tools(messages):
        pieces.append((role_header("tools") + json.dumps(TOOLS) + "<|end_of_text|>\n", GIVEN))
    for index, message in rest:
        header = role_header("tool_response" if message["role"] == "tool" else message["role"])
        content = f"<|tool_call|>[{json.dumps(CALL)}]" if message.get("tool_calls") else message["content"]
        pieces += [(header, GIVEN), (content + "<|end_of_text|>", index in learned), ("\n", GIVEN)]
    return pieces


def _system_of(messages: Messages) -> tuple[str | None, list[tuple[int, dict[str, Any]]]]:
    """The system message, and the numbered rest."""
    numbered = list(enumerate(messages))
    return (messages[0]["content"], numbered[1:]) if messages[0]["role"] == "system" else (None, numbered)


def _is_asked_for_tools(messages: Messages) -> bool:
    return messages[0] == CONVERSATIONS["tools"][0]


def _xml_call() -> str:
    return f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(CALL["arguments"])}}}\n</tool_call>'


def _xml_result(content: str) -> str:
    return f"<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"


# By the name of a template of the package, or of a file in templates/.
SYSTEMS = ("system", "system, many turns", "empty system")
LAYOUTS = {
    "alpaca": Layout(alpaca, "<s>"),
    "chatml": Layout(headed(im_header, "<|im_end|>", "\n")),
    "gemma": Layout(gemma, "<bos>"),
    "guanaco": Layout(guanaco, "<s>"),
    "llama-2": Layout(llama_2, "<s>"),
    "llama-3": Layout(headed(id_header, "<|eot_id|>", begin="<|begin_of_text|>", trim=True), "<|begin_of_text|>"),
    "mistral": Layout(mistral, "<s>"),
    "phi-3": Layout(headed(bar_header, "<|end|>", "\n", begin="<s>"), "<s>"),
    "vicuna": Layout(vicuna, "<s>"),
    "zephyr": Layout(headed(bar_header, "</s>", "\n", begin="<s>"), "<s>"),
    "deepseek-v3": Layout(deepseek, "<s>"),
    "gemma-2": Layout(
        headed(turn_header, "<end_of_turn>", "\n", begin="<bos>", trim=True),
        "<bos>",
        eos="<eos>",
        refuses=("tools", *SYSTEMS),
    ),
    "granite": Layout(granite, refuses=()),
    "llama-3.1": Layout(llama_3_1, "<|begin_of_text|>", "<|eot_id|>", refuses=()),
    "mistral-v0.3": Layout(
        mistral_v3,
        "<s>",
        refuses=(),
        splits=lambda messages: bool(messages[0]["role"] == "system" and messages[0]["content"]),
    ),
    "phi-3.5": Layout(phi_3_5, eos="<|endoftext|>"),
    "qwen2.5": Layout(qwen2_5, eos="<|im_end|>", refuses=()),
    "qwen3": Layout(qwen3, eos="<|im_end|>", refuses=(), splits=lambda _: True),
    "smollm2": Layout(headed(im_header, "<|im_end|>", "\n", own_system="You are SmolLM."), eos="<|im_end|>"),
}


CONTROL_TOKENS = [
    "<s>", "</s>", "<bos>", "<eos>", "<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
    "<|tool_call|>", "<｜User｜>", "<｜Assistant｜>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
]  # fmt: skip


def give_tokens(tokenizer: Any, bos: str | None, eos: str) -> Any:
    """The tokenizer with the control tokens of all templates, and with these two; it puts the BOS before a text."""
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS})
    tokenizer.bos_token, tokenizer.eos_token = bos or "<s>", eos
    if bos is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def give_template(tokenizer: Any, name: str) -> None:
    """Set the template on a tokenizer that has its BOS and EOS."""
    file = Path(__file__).parent / "templates" / f"{name}.jinja"
    set_chat_template(tokenizer, str(file) if file.exists() else name)


# A byte-level vocabulary writes a byte that is a visible Latin-1 letter as itself, the others as U+0100 and on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(0x100) if byte not in _VISIBLE]
_BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}


@cache
def bytes_of_tokens(tokenizer: Any) -> dict[int, bytes]:
    """What each token stands for, from its name in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    meant = {}
    for name, token in vocabulary.items():
        if len(name) == 6 and name.startswith("<0x"):
            meant[token] = bytes([int(name[3:5], 16)])
        elif token in added:
            meant[token] = added[token].content.encode()
        elif "▁" in vocabulary:  # SentencePiece
            meant[token] = name.replace("▁", " ").encode()
        else:
            meant[token] = bytes(_BYTES[letter] for letter in name)
    return meant


def expect(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[int]]:
    """Ids and labels of the pieces: learned is a token of which a byte is, but never the first."""
    text = "".join(text for text, _ in pieces)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    is_learned = [learned for text, learned in pieces for _ in text.encode()]
    bytes_of = bytes_of_tokens(tokenizer)
    labels, begin = [], 0
    for token in ids:
        end = begin + len(bytes_of[token])
        labels.append(token if begin and any(is_learned[begin:end]) else IGNORE_INDEX)
        begin = end
    assert b"".join(bytes_of[token] for token in ids) == text.encode()
    return ids, labels
