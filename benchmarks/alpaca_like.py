"""Rows like Alpaca's, made from a seed: an instruction, in two of five rows an input, and a response.

What matters for a benchmark is how long the rows are, for padding and packing live on the spread: the responses are
log-normal with a median of 50 words and a tail that is cut at 400. The words are common English ones, the rarer the
further down the list, so that a tokenizer cuts them up as it does ordinary text. They mean nothing.

    python benchmarks/alpaca_like.py rows.jsonl --rows 512
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

MEDIAN_WORDS = 50
SIGMA = 0.8  # of the logarithm: one response in two hundred has 400 words or more
LONGEST_WORDS = 400
WITH_INPUT = 0.4

VERBS = (
    "Describe", "Explain", "Summarize", "Rewrite", "List", "Compare", "Suggest", "Write", "Classify", "Translate",
    "Name", "Outline", "Correct", "Generate", "Identify", "Create",
)  # fmt: skip
_MOST_COMMON_FIRST = (
    "the of and to in is that for it as with on be by this are from or an at which can one have not they but was more "
    "their has people time other also when into these some such would than many make use new most about between how "
    "way work them after through part water should first may because over each world these system often important "
    "different need help including information life place number small large good long every form help process energy "
    "increase food state study level reason change health data company program music book student teacher history "
    "language country market growth price product customer service team project plan method result example problem "
    "solution research science nature forest river mountain ocean weather temperature pressure machine engine computer "
    "software network signal message letter story character chapter painting theatre museum garden kitchen recipe "
    "vegetable protein vitamin exercise muscle memory attention behaviour emotion culture tradition ceremony festival "
    "government election policy economy industry factory transport railway bicycle airport harbour bridge architecture "
    "temperament equilibrium photosynthesis biodiversity infrastructure sustainability entrepreneurship semiconductor"
)
WORDS = _MOST_COMMON_FIRST.split()


def make_rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`count` rows with the keys `instruction`, `input` and `output`; the first n are the same for every count."""
    rng = random.Random(f"alpaca-like rows, seed {seed}")
    for _ in range(count):
        instruction = f"{rng.choice(VERBS)} {' '.join(_words(rng, rng.randint(5, 16)))}."
        context = _text(rng, rng.randint(5, 40)) if rng.random() < WITH_INPUT else ""
        yield {"instruction": instruction, "input": context, "output": _text(rng, response_words(rng))}


def response_words(rng: random.Random) -> int:
    drawn = rng.lognormvariate(math.log(MEDIAN_WORDS), SIGMA)
    return max(2, min(LONGEST_WORDS, round(drawn)))


def _words(rng: random.Random, count: int) -> list[str]:
    # The square of a uniform number: the front of the list comes up most, as common words do.
    return [WORDS[int(rng.random() ** 2 * len(WORDS))] for _ in range(count)]


def _text(rng: random.Random, words: int) -> str:
    """Sentences of 6 to 18 words, in paragraphs now and then."""
    pieces: list[str] = []
    while words > 0:
        sentence = _words(rng, min(words, rng.randint(6, 18)))
        words -= len(sentence)
        pieces.append(" ".join(sentence).capitalize() + ".")
        pieces.append("\n\n" if rng.random() < 0.15 else " ")
    return "".join(pieces).strip()


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count, seed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the .jsonl file to write")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_rows(arguments.path, arguments.rows, arguments.seed)


if __name__ == "__main__":
    main()
