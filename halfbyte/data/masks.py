"""Which characters of a conversation are learned: the assistant's turns and the token that ends each.

The template itself says where they are. For an assistant turn i, with `render` the model's chat template,

    before  = render(messages[:i], add_generation_prompt=True)    what the model is given when it must answer
    through = render(messages[:i+1])                              the same with the answer

and where `through` begins with `before`, the rest of it is the answer, end token included. No marker is
searched for, so a user who types "<|im_start|>assistant" moves nothing, and no template has to
carry `{% generation %}`.

If every `through` is also the beginning of the whole rendering, but for control tokens that close a conversation
(Phi-3.5's <|endoftext|>), the row is one text with several learned spans. Some templates break that: they leave the
reasoning out of earlier answers, or mark the last turn. There the row becomes one text for each answer, each exactly
what the model sees when it has to give it. A template that does not even render an answer as the continuation of its
own generation prompt is refused.

A text that its author has laid out in pieces needs no template: it says itself what is learned.
"""

from dataclasses import dataclass

from halfbyte.data.rows import Piece, Row
from halfbyte.data.templates import Conversation, Tokenizer, begins_with_bos
from halfbyte.errors import HalfbyteError


@dataclass(frozen=True)
class Rendering:
    """A text to tokenize with add_special_tokens=False, and the [start, end) spans of characters to learn.

    `bos_id` and `eos_id` stand before and after its tokens where there is no template to write them (the EOS
    is learned if what it ends is). `answers_without_end` counts spans that no special token ends: the model would
    not learn to stop.
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


def is_chat(tokenizer: Tokenizer, row: Row) -> bool:
    """Whether the row is rendered by a chat template; else its author's pieces are used as they are.

    Raises HalfbyteError, with the row's source, for a conversation that has neither.
    """
    if row.messages and (tokenizer.chat_template or row.alpaca is not None):
        return True
    if row.pieces is None:
        raise HalfbyteError(
            f"{row.source}: this model's tokenizer has no chat template, so a row of messages cannot be "
            "rendered: use the instruction-tuned model, set chat_template, or use Alpaca rows"
        )
    return False


def render_row(
    tokenizer: Tokenizer,
    row: Row,
    specials: tuple[str, ...],  # special_tokens(tokenizer), asked for once
    train_on_source: bool = False,
    train_on_last_turn: bool = False,
) -> list[Rendering]:
    """The row as text with its learned spans: one Rendering, or one for each answer where it cannot be one.

    Learned is what the assistant says: in all of its turns, in the last one (what follows the last message that is
    another's, calls of tools on the way included), or with `train_on_source` everything. Raises HalfbyteError with
    the row's source where the template refuses the conversation, leaves out something of it, or renders an
    answer as something else than a continuation of its generation prompt.
    """
    if not is_chat(tokenizer, row):
        return [render_pieces(tokenizer, row, train_on_source)]
    conversation = Conversation(tokenizer, row)
    whole = conversation.render()
    conversation.check_nothing_is_left_out(whole)
    if train_on_source:
        return [Rendering(whole, [(0, len(whole))])]
    answers = [
        _answer(conversation, index, whole, specials)
        for index in _learned_turns(conversation.messages, train_on_last_turn)
    ]
    spans = [_span_in(whole, answer, specials) for answer in answers]
    placed = [span for span in spans if span is not None]
    without_end = sum(answer.answers_without_end for answer in answers)
    if len(placed) == len(answers):
        return [Rendering(whole, placed, answers_without_end=without_end)]
    return answers


def _learned_turns(messages: list[dict[str, object]], last_turn: bool) -> list[int]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not last_turn:
        return turns
    asked = max((i for i in range(turns[-1]) if messages[i]["role"] not in ("assistant", "tool")), default=-1)
    return [index for index in turns if index > asked]


def _answer(conversation: Conversation, index: int, whole: str, specials: tuple[str, ...]) -> Rendering:
    """The conversation up to and with the answer `messages[index]`, of which that answer alone is learned."""
    is_last = index == len(conversation.messages) - 1
    through = whole if is_last else conversation.render(index + 1)
    before = conversation.render(index, add_generation_prompt=True)
    where = f"{conversation.source}: messages[{index}]"
    if not through.startswith(before):
        same = _same(before, through)
        raise HalfbyteError(
            f"{where}: the model's chat template does not render this answer as a continuation of its "
            f"generation prompt (it has {through[same : same + 30]!r} where the prompt has "
            f"{before[same : same + 30]!r}), so what to learn cannot be told: use another chat template "
            "(chat_template), or train_on_source"
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


def _same(one: str, other: str) -> int:
    """How many characters the two texts begin with alike."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _span_in(whole: str, answer: Rendering, specials: tuple[str, ...]) -> tuple[int, int] | None:
    """Where the answer is in the whole conversation; None where that has it in other words."""
    ((start, end),) = answer.spans
    if whole.startswith(answer.text):
        return start, end
    same = _same(whole, answer.text)
    for token in specials:  # "<|end|>" and "<|endoftext|>" begin alike: a token is the same as a whole or not at all
        found = answer.text.find(token, max(0, same - len(token) + 1), same + len(token) - 1)
        same = found if 0 <= found < same < found + len(token) else same
    learned = answer.text[start:same].rstrip()
    if start < same and learned.endswith(specials) and not _without(answer.text[same:], specials):
        return start, start + len(learned)
    return None


def _without(text: str, tokens: tuple[str, ...]) -> str:
    """What is left of the text without these tokens at its beginning, and white space."""
    text = text.lstrip()
    while text.startswith(tokens):
        text = text.removeprefix(max((token for token in tokens if text.startswith(token)), key=len)).lstrip()
    return text


def turn_end_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the control tokens with which the chat template ends an answer: where generation has to stop.

    Empty where there is no template, or none that ends an answer with a control token.
    """
    if not tokenizer.chat_template:
        return []
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    specials = special_tokens(tokenizer)
    try:
        (rendering,) = render_row(tokenizer, Row(said, "turn_end_ids"), specials)
    except (HalfbyteError, ValueError):
        return []
    ((start, end),) = rendering.spans
    answer, ends = rendering.text[start:end], []
    while tokens := [token for token in specials if answer.rstrip().endswith(token)]:
        ends.append(max(tokens, key=len))
        answer = answer.rstrip().removesuffix(ends[-1])
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in ends if token in vocabulary]


def render_pieces(tokenizer: Tokenizer, row: Row, train_on_source: bool = False) -> Rendering:
    """A text as its author laid it out. A BOS where the tokenizer puts one, an EOS at the end; neither twice."""
    if tokenizer.eos_token_id is None:
        raise HalfbyteError(
            f"{row.source}: the tokenizer has no EOS token to end a text with, so the model could not learn to "
            "stop: set tokenizer.eos_token"
        )
    pieces = [piece for piece in row.pieces or () if piece.text]
    if train_on_source:
        pieces = [Piece(piece.text, True) for piece in pieces]
    text, spans = "", []
    for piece in pieces:
        if piece.learned:
            spans.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    # As an id, because "<s>" in the text would tokenize the word after it differently in SentencePiece vocabularies.
    bos = begins_with_bos(tokenizer) and not text.startswith(tokenizer.bos_token or "")
    ended = bool(tokenizer.eos_token) and text.rstrip().endswith(tokenizer.eos_token or "")
    is_learned = bool(pieces) and pieces[-1].learned
    return Rendering(
        text,
        spans,
        bos_id=tokenizer.bos_token_id if bos else None,
        eos_id=None if ended or not is_learned else tokenizer.eos_token_id,
    )
