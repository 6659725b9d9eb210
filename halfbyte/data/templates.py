"""From a conversation to the text the model sees, by the tokenizer's own chat template.

A tokenizer without one gets the Alpaca prompt, in the words of Stanford's release, for Alpaca rows alone: a
conversation has no rendering that a base model could be expected to know, so `messages` rows are refused
there.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jinja2

from halfbyte.data.rows import Alpaca
from halfbyte.errors import HalfbyteError

# https://github.com/tatsu-lab/stanford_alpaca, "Data Release". The line break after "Response:" is everyone's
# since.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


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

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...

    def decode(self, token_ids: list[int], **options: Any) -> Any: ...


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, str]],
    source: str,  # "file:line", for the error
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text. HalfbyteError where the template refuses it (a role, an order it does not
    know)."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise HalfbyteError(
            f"{source}: the model's chat template refuses this conversation: {error or type(error).__name__}"
        ) from error
    return str(text)


def render_alpaca_prompt(alpaca: Alpaca) -> str:
    """The prompt up to where the response begins."""
    template = ALPACA_WITH_INPUT if alpaca.input else ALPACA_WITHOUT_INPUT
    return template.format(instruction=alpaca.instruction, input=alpaca.input)
