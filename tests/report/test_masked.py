"""What is learned in colour, or in brackets; control tokens as blocks; nothing that a terminal would obey."""

import re

from halfbyte.report.masked import LEARNED, LEARNED_CONTROL, READ, READ_CONTROL, masked_text

CONTROL = re.compile(r"<\|im_start\|>|<\|im_end\|>")
PIECES = [("<|im_start|>user\nhi \x1b[31m<|im_end|>\n", False), ("yes<|im_end|>", True), ("\n", False)]


def test_in_colour() -> None:
    text = masked_text(PIECES, CONTROL, colours=True)
    parts = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert parts == [
        ("<|im_start|>", READ_CONTROL),
        ("user\nhi \\x1b[31m", READ),
        ("<|im_end|>", READ_CONTROL),
        ("\n", READ),
        ("yes", LEARNED),
        ("<|im_end|>", LEARNED_CONTROL),
        ("\n", READ),
    ]


def test_in_brackets() -> None:
    text = masked_text(PIECES, CONTROL, colours=False)
    assert text.plain == "<|im_start|>user\nhi \\x1b[31m<|im_end|>\n⟦yes<|im_end|>⟧\n"
    assert text.spans == []


def test_of_a_long_text_the_middle_is_left_out() -> None:
    text = masked_text([("a" * 500, False), ("b" * 500, True)], CONTROL, colours=True, most_letters=100)
    assert text.plain == "a" * 50 + " … 900 letters … " + "b" * 50
