"""An example as a person should see it before training: what is learned in colour, control tokens as blocks."""

import re
from collections.abc import Iterable

from rich.text import Text

from halfbyte.report.terminal import printable

LEARNED, READ = "green", "dim"
LEARNED_CONTROL, READ_CONTROL = "bold black on green", "black on bright_black"


def masked_text(
    pieces: Iterable[tuple[str, bool]],  # the text, in pieces that are learned (True) or only read
    control_tokens: re.Pattern[str],
    colours: bool,
    most_letters: int | None = None,  # of a longer text the middle is left out
) -> Text:
    """Learned text in green and the rest dim, control tokens as blocks; without colours, learned text in ⟦brackets⟧."""
    shown = Text()
    for text, learned in pieces:
        # A piece ends where learning does, so a control token is in one piece.
        shown.append("⟦" if learned and not colours else "")
        for part, is_control in _parts(text, control_tokens):
            style = (LEARNED_CONTROL if learned else READ_CONTROL) if is_control else (LEARNED if learned else READ)
            shown.append(printable(part, keep="\n\t"), style if colours else "")
        shown.append("⟧" if learned and not colours else "")
    if most_letters is not None and len(shown) > most_letters:
        left_out = len(shown) - most_letters
        head, tail = shown[: most_letters // 2], shown[len(shown) - most_letters // 2 :]
        shown = Text.assemble(head, (f" … {left_out:,} letters … ", "italic yellow" if colours else ""), tail)
    return shown


def _parts(text: str, control_tokens: re.Pattern[str]) -> Iterable[tuple[str, bool]]:
    end = 0
    for match in control_tokens.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], False
        yield match[0], True
        end = match.end()
    if end < len(text):
        yield text[end:], False
