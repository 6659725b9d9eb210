"""A chat template in Go's template language, which is Ollama's, rendering what the tokenizer's own renders.

Jinja cannot be translated, but it can be asked. Chat templates are nearly all of one form: what stands before a message
depends on its role and on the role before it, and what stands at the end on the last role,

    start→system, start→user, system→user, user→assistant, assistant→user, …; user→end, assistant→end

so rendering a few conversations of sentinels tells all of these texts, ChatML's as well as Llama 2's, where a system
message is a part of the first question. Other conversations are then rendered in both ways, and a template for which
they differ (turns that are counted, a date) is none that can be said so.

Ollama's own part: it puts the BOS in front where the tokenizer does, so that it is left out here, and it joins messages
of one role that follow each other. Go has no function that strips spaces; that a template does is a note.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from halfbyte.data.templates import Tokenizer, begins_with_bos, render_chat
from halfbyte.errors import HalfbyteError

Messages = list[dict[str, str]]
START, END = "start", "end"
_SENTINELS = ("Qvb1Zx", "Qvb2Zx", "Qvb3Zx", "Qvb4Zx", "Qvb5Zx", "Qvb6Zx")
_ASKED: tuple[tuple[str, ...], ...] = (
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
)
_UNUSUAL: tuple[tuple[str, ...], ...] = (
    ("user", "assistant"),
    ("user", "assistant", "system", "user"),
)  # what it says of them need not fit
_ROLES = ("system", "user", "assistant")
_CHECKED = (
    ("user",),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant", "user"),
)
_CONTENTS = (
    "Hello!",
    'He said: "{{ .Role }}"\n\tand \\n left.',
    "{% x %} ```py\nx = 1\n```",
    "naïve — 日本語 🎈",
    "a",
    "0",
)


@dataclass(frozen=True)
class GoTemplate:
    """What stands between messages, by the roles before and after."""

    between: Mapping[tuple[str, str], str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """In Go's language."""
        lines = [f'{{{{- $before := "{START}" }}}}', "{{- range .Messages }}"]
        word = "if"
        for role in _ROLES:
            befores = {before: text for (before, after), text in self.between.items() if after == role}
            if not befores:
                continue
            condition = f'eq .Role "{role}"'
            if role == "system" and befores.keys() == {START}:
                condition = f'and ({condition}) (eq $before "{START}")'
            lead = _choice(befores)
            lines.append(f"{{{{- {word} {condition} }}}}{lead}{{{{ .Content }}}}{{{{ $before = .Role }}}}")
            word = "else if"
        ends = {before: text for (before, after), text in self.between.items() if after == END}
        ends.setdefault("assistant", "")  # goes on with that answer
        return "\n".join([*lines, "{{- end }}", "{{- end }}"]) + _choice(ends)


def go_template(tokenizer: Tokenizer) -> GoTemplate:
    """The tokenizer's chat template for Ollama.

    Raises:
        HalfbyteError: there is none, or it cannot be said in this form.
    """
    if not tokenizer.chat_template:
        raise HalfbyteError("The tokenizer has no chat template.")
    if "strftime_now" in json.dumps(tokenizer.chat_template):
        raise HalfbyteError("The chat template writes the day's date, which Go's template language cannot.")
    begins = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
    between: dict[tuple[str, str], str] = {}
    for roles in _ASKED:
        try:
            _add(between, _texts_between(tokenizer, roles, begins))
        except _RefusedError as refused:
            if "system" not in roles:
                raise HalfbyteError(f"The chat template refuses a plain conversation ({refused}).") from refused
    for roles in _UNUSUAL:
        with suppress(HalfbyteError):
            _add(between, _texts_between(tokenizer, roles, begins))
    notes = []
    if (START, "system") not in between:
        notes.append("the chat template takes no system message, so in Ollama none is written either")
    elif ("assistant", "system") not in between:
        notes.append("in Ollama a system message is written at the beginning alone, since the chat template is so")
    for order in _CHECKED:
        if "system" not in order or (START, "system") in between:
            said = [{"role": role, "content": text} for role, text in zip(order, _CONTENTS * 2, strict=False)]
            if _put_together(between, said) != _rendered(tokenizer, said, begins):
                raise _not_of_this_form(f"a conversation of {len(order)} messages comes out otherwise")
    padded = _rendered(tokenizer, [{"role": "user", "content": "  a \n"}], begins)
    if padded != _put_together(between, [{"role": "user", "content": "  a \n"}]):
        if padded != _put_together(between, [{"role": "user", "content": "a"}]):
            raise _not_of_this_form("it changes what a message says")
        notes.append("the chat template strips spaces from the ends of messages, and in Ollama they stay")
    return GoTemplate(between, tuple(notes))


def _texts_between(tokenizer: Tokenizer, roles: tuple[str, ...], begins: str) -> dict[tuple[str, str], str]:
    """From one conversation of sentinels."""
    said = [{"role": role, "content": text} for role, text in zip(roles, _SENTINELS, strict=False)]
    rest = _rendered(tokenizer, said, begins)
    between: dict[tuple[str, str], str] = {}
    before = START
    for message in said:
        text, found, rest = rest.partition(message["content"])
        if not found:
            raise _not_of_this_form(f"a message of the role {message['role']} is not where it was said")
        _add(between, {(before, message["role"]): text})
        before = message["role"]
    return between | {(before, END): rest}


def _add(between: dict[tuple[str, str], str], more: dict[tuple[str, str], str]) -> None:
    """Raises HalfbyteError, and adds nothing, where it contradicts what is there."""
    for key, text in more.items():
        if between.get(key, text) != text:
            raise _not_of_this_form(f"what is between {key[0]} and {key[1]} is not always the same")
    between |= more


def _put_together(between: Mapping[tuple[str, str], str], messages: Messages) -> str:
    text, before = "", START
    for message in messages:
        text += between[before, message["role"]] + message["content"]
        before = message["role"]
    return text + between[before, END]


class _RefusedError(HalfbyteError):
    """The template does not take a conversation."""


def _rendered(tokenizer: Tokenizer, messages: Messages, begins: str) -> str:
    try:
        text = render_chat(tokenizer, [dict(message) for message in messages], "", add_generation_prompt=True)
    except HalfbyteError as error:
        raise _RefusedError(str(error)) from error
    if not text.startswith(begins):
        raise _not_of_this_form(f"it begins without {begins}, which Ollama puts in front of every text")
    return text.removeprefix(begins)


def _not_of_this_form(why: str) -> HalfbyteError:
    return HalfbyteError(f"The chat template cannot be said in Go's template language: {why}.")


def _choice(befores: dict[str, str]) -> str:
    """A text by the role before; the commonest needs no condition."""
    texts = list(befores.values())
    usual = max(texts, key=texts.count)
    others = {before: text for before, text in befores.items() if text != usual}
    said, word = "", "if"
    for text in dict.fromkeys(others.values()):
        roles = " ".join(f'"{before}"' for before, other in others.items() if other == text)
        said += f"{{{{ {word} eq $before {roles} }}}}{_literal(text)}"
        word = "else if"
    return f"{said}{{{{ else }}}}{_literal(usual)}{{{{ end }}}}" if said else _literal(usual)


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
