"""Medians, ratios and goals of the benchmark's table."""

import pytest

from benchmarks.figures import AT_MOST, Goal, compare, pairwise, side


def turns(*seconds: float, units: float = 100.0) -> list[dict]:
    return [
        {"repetition": i, "seconds": s, "units": units, "peak_bytes": 1000 * (i + 1)} for i, s in enumerate(seconds)
    ]


def test_a_side_is_the_median_of_its_turns():
    found = side(turns(1.0, 4.0, 2.0), "tokens/s", "as it is")
    assert found.value == pytest.approx(50.0)
    assert found.peak_bytes == 3000


def test_seconds_are_for_one_unit():
    assert side(turns(1.0, 4.0, 2.0, units=2), "s", "").value == pytest.approx(1.0)


def test_ratios_are_taken_within_a_repetition():
    # The second round was twice as slow for both: the ratio does not see it.
    assert pairwise(turns(1.0, 2.0), turns(3.0, 6.0)) == pytest.approx([3.0, 3.0])


def test_a_time_ratio_is_the_other_way_round():
    assert pairwise(turns(1.0), turns(2.0), "time") == pytest.approx([0.5])


def test_units_may_differ_between_the_sides():
    # A peer that goes over fewer rows is compared by what it does in a second.
    assert pairwise(turns(1.0, units=500), turns(2.0, units=100)) == pytest.approx([10.0])


def test_turns_of_different_repetitions_are_refused():
    with pytest.raises(ValueError, match="different repetitions"):
        pairwise(turns(1.0, 2.0), list(reversed(turns(1.0, 2.0))))


@pytest.mark.parametrize(("goal", "reached", "met"), [
    (Goal(3.5), 3.5, True), (Goal(3.5), 3.49, False), (Goal(1.05, AT_MOST), 1.05, True),
    (Goal(1.05, AT_MOST), 1.06, False),
])  # fmt: skip
def test_goals(goal, reached, met):
    assert goal.met(reached) is met


def test_a_row_says_by_itself_whether_its_goal_is_met():
    row = compare("A", "a step", "tokens/s", (turns(1.0, 1.0), "ours"), (turns(3.0, 4.0), "theirs"), Goal(3.5))
    record = row.to_record()
    assert record["ratio"] == pytest.approx(3.5)
    assert record["met"] is True
    assert compare("A", "", "s", (turns(1.0), ""), (turns(1.0), ""), None).to_record()["met"] is None
