"""The rows that are like Alpaca's."""

import itertools
import random
import statistics

from benchmarks.alpaca_like import LONGEST_WORDS, make_rows, response_words


def test_lengths_are_log_normal_with_a_median_of_50_and_a_tail_to_400():
    rng = random.Random(0)
    words = sorted(response_words(rng) for _ in range(20_000))
    assert 48 <= statistics.median(words) <= 52
    assert words[-1] == LONGEST_WORDS
    assert 130 <= words[18_000] <= 150  # e^(1.2816·0.8)·50 = 139
    assert words[0] >= 2


def test_rows_are_the_same_for_the_same_seed_and_the_first_of_more():
    assert list(make_rows(8)) == list(itertools.islice(make_rows(100), 8))
    assert list(make_rows(8)) != list(make_rows(8, seed=1))


def test_rows_have_alpacas_keys_and_as_many_inputs():
    rows = list(make_rows(500))
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)
    assert all(row["instruction"] and row["output"] for row in rows)
    assert 0.33 <= sum(bool(row["input"]) for row in rows) / len(rows) <= 0.47
    lengths = [len(row["output"].split()) for row in rows]
    assert max(lengths) <= LONGEST_WORDS
