"""Which characters of a conversation are learned: the assistant's turns and the token that ends each.

The template itself says where they are. For an assistant turn i, with `render` the model's chat template,

    before  = render(messages[:i], add_generation_prompt=True)    what the model is given when it must answer
    through = render(messages[:i+1])                              the same with the answer

and where `through` begins with `before`, the rest of it is the answer, end token included. No marker is
searched for, so a user who types "<|im_start|>assistant" moves nothing, and no template has to
carry `{% generation %}`.

If every `through` is also the beginning of the whole rendering, the row is one text with several learned
spans. Some templates break that: they leave the reasoning out of earlier answers, or mark the last turn.
There the row becomes one text for each answer, each exactly what the model sees when it has to give it. A
template that does not even render an answer as the continuation of its own generation prompt is refused.
"""

from dataclasses import dataclass

from halfbyte.data.rows import Row
from halfbyte.data.templates import Tokenizer, render_alpaca_prompt, render_chat
from halfbyte.errors import HalfbyteError


@dataclass(frozen=True)
class Rendering:
    """A text to tokenize with add_special_tokens=False, and the [start, end) spans of characters to learn.

    `bos_id` and `eos_id` stand before and after its tokens where there is no template to write them (the EOS
    is learned). `answers_without_end` counts spans that no special token ends: the model would not learn to
    stop.
    """

    text: str
    spans: list[tuple[int, int]]
    bos_id: int | None = None
    eos_id: int | None = None
    answers_without_end: int = 0


def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of all control tokens, "<|im_end|>" and the like."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(tokens | ({tokenizer.eos_token} if tokenizer.eos_token else set())))


def render_row(
    tokenizer: Tokenizer,
    row: Row,
    specials: tuple[str, ...],  # special_tokens(tokenizer), asked for once
    train_on_source: bool = False,
) -> list[Rendering]:
    """The row as text with its learned spans: one Rendering, or one for each answer where it cannot be one.

    Raises HalfbyteError with the row's source where the template refuses the conversation or renders an
    answer as something else than a continuation of its generation prompt.
    """
    if not tokenizer.chat_template:
        return [_render_alpaca(tokenizer, row, train_on_source)]
    whole = render_chat(tokenizer, row.messages, row.source)
    if train_on_source:
        return [Rendering(whole, [(0, len(whole))])]
    answers = []
    for index, message in enumerate(row.messages):
        if message["role"] == "assistant":
            through = render_chat(tokenizer, row.messages[: index + 1], row.source)
            answers.append(_answer(tokenizer, row, index, through, specials))
    if all(whole.startswith(answer.text) for answer in answers):
        spans = [span for answer in answers for span in answer.spans]
        return [Rendering(whole, spans, answers_without_end=sum(a.answers_without_end for a in answers))]
    return answers


def _answer(tokenizer: Tokenizer, row: Row, index: int, through: str, specials: tuple[str, ...]) -> Rendering:
    """The conversation up to and with the answer `messages[index]`, of which that answer alone is learned."""
    before = render_chat(tokenizer, row.messages[:index], row.source, add_generation_prompt=True)
    where = f"{row.source}: messages[{index}]"
    if not through.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(before, through, strict=False)) if a != b), len(through))
        raise HalfbyteError(
            f"{where}: the model's chat template does not render this answer as a continuation of its "
            f"generation prompt (it has {through[same : same + 30]!r} where the prompt has "
            f"{before[same : same + 30]!r}), so what to learn cannot be told: use another chat template, or "
            "train_on_source"
        )
    # Templates put a line break after the end token, which generation never reaches: it is not learned. White
    # space that no special token precedes is the end itself, and is.
    answer = through[len(before) :].rstrip()
    end_token = next((token for token in specials if answer.endswith(token)), "")
    if not answer.removesuffix(end_token).strip():
        raise HalfbyteError(f"{where}: the model's chat template leaves nothing of this answer to learn from")
    if end_token:
        return Rendering(through, [(len(before), len(before) + len(answer))])
    return Rendering(through, [(len(before), len(through))], answers_without_end=1)


def _render_alpaca(tokenizer: Tokenizer, row: Row, train_on_source: bool) -> Rendering:
    if row.alpaca is None:
        raise HalfbyteError(
            f"{row.source}: this model's tokenizer has no chat template, so a row of messages cannot be "
            "rendered: use the instruction-tuned model, or Alpaca rows"
        )
    if tokenizer.eos_token_id is None:
        raise HalfbyteError(
            "the tokenizer has neither a chat template nor an EOS token, so the model could not learn to "
            "stop: set tokenizer.eos_token"
        )
    prompt = render_alpaca_prompt(row.alpaca)
    text = prompt + row.alpaca.output
    # What the tokenizer puts before any text, if anything; as an id, because "<s>" in the text would tokenize
    # the word after it differently in SentencePiece vocabularies.
    begins = list(tokenizer("", add_special_tokens=True)["input_ids"])[:1]
    has_bos = tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id]
    start = 0 if train_on_source else len(prompt)
    return Rendering(
        text,
        [(start, len(text))],
        bos_id=tokenizer.bos_token_id if has_bos else None,
        eos_id=tokenizer.eos_token_id,
    )
