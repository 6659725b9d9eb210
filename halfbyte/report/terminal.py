"""What reaches a person's terminal: text, and nothing that the terminal would obey."""


def printable(text: str, keep: str = "") -> str:
    """`text` with everything that is not printed (escape sequences, line ends) spelled out, except the signs in `keep`.

    A file name, a row of somebody's data set and a model's answer may hold anything.
    """
    return "".join(sign if sign.isprintable() or sign in keep else repr(sign)[1:-1] for sign in text)
