"""Lengths in bins that a person can read, bars, and the picture."""

import importlib.util
import itertools
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.report.histogram import Bin, bar, bins_of, draw_png, percentile


@pytest.mark.parametrize("most", [1, 7, 60, 900, 30_000])
def test_bins_hold_every_example_once(most: int) -> None:
    lengths = Counter(random.Random(most).choices(range(1, most + 1), k=500))
    bins = bins_of(lengths)
    assert sum(bin_.count for bin_ in bins) == 500
    assert len(bins) <= 13
    for before, after in itertools.pairwise(bins):
        assert after.first == before.last + 1
    for bin_ in bins:
        assert bin_.count == sum(count for length, count in lengths.items() if bin_.first <= length <= bin_.last)


def test_one_long_example_does_not_make_all_others_one_bar() -> None:
    bins = bins_of(Counter({20: 50, 40: 49, 60: 50, 5000: 1}))
    assert bins[-1] == Bin(65, 5000, 1)
    assert len(bins) > 5


def test_no_lengths_have_no_bins() -> None:
    assert bins_of({}) == []
    assert percentile({}, 0.5) == 0


def test_percentiles() -> None:
    lengths = dict.fromkeys(range(1, 101), 1)
    assert [percentile(lengths, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1, 50, 95, 100]


def test_a_bar_is_as_long_as_its_count_and_never_nothing_for_something() -> None:
    assert bar(80, 80, 10) == "█" * 10
    assert bar(40, 80, 10) == "█" * 5
    assert bar(1, 10_000, 10) == "▏"
    assert bar(0, 80, 10) == ""


def test_without_matplotlib_the_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(HalfbyteError, match="takes matplotlib: pip install matplotlib"):
        draw_png({"rows.jsonl": {3: 4}}, 10, tmp_path / "lengths.png")


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
def test_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "lengths.png"
    draw_png({"rows.jsonl": {3: 4, 90: 1}, "held.jsonl": {5: 2}}, 50, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(HalfbyteError, match="cannot be written"):
        draw_png({"rows.jsonl": {3: 4}}, 50, tmp_path / "absent" / "lengths.png")
