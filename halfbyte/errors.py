"""The one exception that is meant to be read by a person."""


class HalfbyteError(Exception):
    """Bad input, told in one sentence: what is wrong, where (file, line, key, tensor), and what to do.

    The command line prints the sentence and exits with code 2; library users catch it. Anything else
    that escapes halfbyte is a bug of ours and keeps its traceback.
    """
