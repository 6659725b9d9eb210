"""From a conversation to the text the model sees: by the tokenizer's own chat template, one of ours, or a file's.

The templates of `chat_templates/` are for base models, whose tokenizers have none. Each writes a BOS where the
tokenizer would put one before a text, and ends an answer with a token that the tokenizer has. A template is set on
the tokenizer itself, system prompt and all, so what is saved beside an adapter is what it was trained with, for every
program that reads tokenizers.
"""

import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jinja2

from halfbyte.data.rows import Row
from halfbyte.errors import HalfbyteError


class Tokenizer(Protocol):
    """What the data folder needs of a transformers tokenizer (one backed by `tokenizers`, for the
    offsets)."""

    chat_template: Any  # str, a dict of named ones, or None
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...  # id -> a token with .content and .special

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...

    def decode(self, token_ids: list[int], **options: Any) -> Any: ...


class _Markers(NamedTuple):
    """What a template of ours needs the tokenizer to have."""

    end: str | None = None  # the token that ends an answer; None: the tokenizer's EOS
    others: tuple[str, ...] = ()


# The files of chat_templates/. Markers that are no tokens anywhere (USER:, [INST]) are text, and need nothing.
_MARKERS = {
    "alpaca": _Markers(),
    "chatml": _Markers("<|im_end|>", ("<|im_start|>",)),
    "gemma": _Markers("<end_of_turn>", ("<start_of_turn>",)),
    "guanaco": _Markers(),
    "llama-2": _Markers(),
    "llama-3": _Markers("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "mistral": _Markers(),
    "phi-3": _Markers("<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")),
    "vicuna": _Markers(),
    "zephyr": _Markers(),
}
NAMED_TEMPLATES = tuple(_MARKERS)


def set_chat_template(tokenizer: Tokenizer, chat_template: str | None, system_prompt: str | None = None) -> None:
    """Give the tokenizer another chat template, and a system message for conversations that have none.

    `chat_template` is a name of NAMED_TEMPLATES or the path of a Jinja file; None leaves the tokenizer's own. One of
    ours also makes the token that ends its answers the tokenizer's EOS, so that generation stops there.

    Raises:
        HalfbyteError: no such template or file, a file that is not a template, a tokenizer without the tokens that
            the template is made of, a system prompt without a template to write it.
    """
    if chat_template in _MARKERS:
        tokenizer.chat_template = _named(tokenizer, chat_template)
    elif chat_template is not None:
        tokenizer.chat_template = _from_file(tokenizer, chat_template)
    if system_prompt is None:
        return
    if not tokenizer.chat_template:
        raise HalfbyteError(
            "system_prompt needs a chat template, and this model's tokenizer has none: set chat_template, to "
            f"{', '.join(NAMED_TEMPLATES[:-1])} or {NAMED_TEMPLATES[-1]}, or to a Jinja file"
        )
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = _with_system(tokenizer.chat_template, system_prompt)
    else:
        tokenizer.chat_template = {
            name: _with_system(text, system_prompt) for name, text in tokenizer.chat_template.items()
        }


def alpaca_template(tokenizer: Tokenizer) -> str:
    """Stanford's Alpaca prompt as a chat template: what Alpaca rows are written in where the tokenizer has none.

    https://github.com/tatsu-lab/stanford_alpaca, "Data Release", with everyone's line break after "Response:". Raises
    HalfbyteError for a tokenizer without an EOS.
    """
    return _named(tokenizer, "alpaca")


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer, left to itself, puts a BOS before a text."""
    begins = list(tokenizer("", add_special_tokens=True)["input_ids"])[:1]
    return tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id]


def _named(tokenizer: Tokenizer, name: str) -> str:
    markers = _MARKERS[name]
    vocabulary = tokenizer.get_vocab() if markers.end else {}
    lacking = [token for token in (*markers.others, markers.end) if token and token not in vocabulary]
    if lacking:
        others = ", ".join(other for other, needs in _MARKERS.items() if needs.end is None)
        raise HalfbyteError(
            f"chat_template {name} is made of tokens that this model's tokenizer does not have ({lacking[0]}), so it "
            f"would be spelt in letters and its answers would never end: use one that needs an EOS alone ({others})"
        )
    if markers.end:
        tokenizer.eos_token = markers.end
    if tokenizer.eos_token_id is None:
        raise HalfbyteError(
            "the tokenizer has neither a chat template nor an EOS token, so the model could not learn to "
            "stop: set tokenizer.eos_token"
        )
    text = _read_named(name)
    return text if begins_with_bos(tokenizer) else "{%- set bos_token = '' %}\n" + text


@cache
def _read_named(name: str) -> str:
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _from_file(tokenizer: Tokenizer, name: str) -> str:
    path = Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        meant = difflib.get_close_matches(name.lower(), NAMED_TEMPLATES, n=1)
        way_out = f"did you mean {meant[0]}?" if meant else f"name one of {', '.join(NAMED_TEMPLATES)}, or a Jinja file"
        raise HalfbyteError(f"chat_template {name} is neither a template of ours nor a file: {way_out}") from None
    except UnicodeDecodeError as error:
        raise HalfbyteError(f"chat_template {path}: not UTF-8 text (byte {error.start}), so not a template") from None
    except OSError as error:
        raise HalfbyteError(f"chat_template {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise HalfbyteError(f"chat_template {path} is empty: there is no template in it")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise HalfbyteError(f"chat_template {path}:{error.lineno}: not a Jinja template: {error.message}") from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError):
        pass  # it may refuse this conversation and take those of the data
    return text


def _with_system(template: str, system_prompt: str) -> str:
    # A JSON text is a Jinja text too. trim_blocks, which chat templates are rendered with, takes the line break.
    message = f'{{"role": "system", "content": {json.dumps(system_prompt, ensure_ascii=False)}}}'
    return (
        "{%- if not messages or messages[0].role != 'system' %}"
        f"{{%- set messages = [{message}] + messages %}}{{%- endif %}}\n{template}"
    )


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    source: str,  # "file:line", for the error
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template: str | None = None,  # another than the tokenizer's
) -> str:
    """The conversation as text. HalfbyteError where the template refuses it (a role, an order it does not
    know)."""
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise HalfbyteError(
            f"{source}: the model's chat template refuses this conversation: {error or type(error).__name__}"
        ) from error
    return str(text)


class Conversation:
    """A row as its tokenizer's chat template writes it; an Alpaca row also without one."""

    def __init__(self, tokenizer: Tokenizer, row: Row) -> None:
        self.tokenizer = tokenizer
        self.source = row.source
        self.tools = row.tools or None
        self.messages = row.messages
        self.chat_template = None
        if row.alpaca is not None:
            # The Alpaca template writes the fields; to every other one they are nothing.
            instruction = {"instruction": row.alpaca.instruction, "input": row.alpaca.input}
            self.messages = [row.messages[0] | instruction, *row.messages[1:]]
            self.chat_template = None if tokenizer.chat_template else alpaca_template(tokenizer)

    def render(self, end: int | None = None, add_generation_prompt: bool = False) -> str:
        """The messages before `end`; all of them where it is not given."""
        return render_chat(
            self.tokenizer, self.messages[:end], self.source, add_generation_prompt, self.tools, self.chat_template
        )

    def check_nothing_is_left_out(self, whole: str) -> None:
        """Raises HalfbyteError where the template passes over tools, their calls or results, or the reasoning.

        `whole` is the conversation's rendering. What makes no difference to it is not in it.
        """
        without: dict[str, tuple[list[dict[str, Any]], Any]] = {}
        if self.tools:
            without["tools"] = (self.messages, None)
        roles = [message["role"] for message in self.messages]
        if "tool" in roles:
            results = [m | {"content": m["content"] + "-"} if m["role"] == "tool" else m for m in self.messages]
            without["messages of the role 'tool'"] = (results, self.tools)
        last = len(roles) - 1 - roles[::-1].index("assistant")  # templates may leave the reasoning out of earlier ones
        for key, indices in (("tool_calls", range(len(roles))), ("reasoning_content", [last])):
            if any(self.messages[index].get(key) for index in indices):
                bare = [
                    {name: value for name, value in message.items() if name != key or index not in indices}
                    for index, message in enumerate(self.messages)
                ]
                without[f"'{key}'"] = (bare, self.tools)
        for what, (messages, tools) in without.items():
            if self._renders_as(whole, messages, tools):
                raise HalfbyteError(
                    f"{self.source}: the model's chat template passes over {what}, so they could not be learned: use "
                    "one that writes them (chat_template), or remove them from the row"
                )

    def _renders_as(self, text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> bool:
        try:
            return text == render_chat(
                self.tokenizer, messages, self.source, tools=tools, chat_template=self.chat_template
            )
        except HalfbyteError:
            return False  # a template that misses something has looked at it
