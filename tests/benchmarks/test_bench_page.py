"""The page says what was measured, and nothing else."""

import pytest

from benchmarks.__main__ import make_options, parse_arguments
from benchmarks.figures import AT_MOST, Goal, Row, Side
from benchmarks.page import render, render_row
from benchmarks.results import Results, latest_of_each_workload, read_results


def row(workload="A", ratios=(3.0, 4.0, 3.6), goal=Goal(3.5), ratio_of="speed", unit="tokens/s") -> Row:  # noqa: B008
    ours, theirs = Side(900.0, "avx512bf16", 1_500_000_000), Side(250.0, "checkpointing off", 4_300_000_000)
    return Row(workload, "a step", unit, ours, theirs, list(ratios), ratio_of, goal)


def a_run(*rows: Row, date="2026-01-01 12:00 UTC", foreign=0.0, smoke=False) -> Results:
    results = Results()
    results.add("run", date=date, commit="abc1234", workloads="A", repeats=None, smoke=smoke)
    peaks = dict.fromkeys(("bf16_flops", "float32_flops", "read_bytes_per_second", "copy_bytes_per_second"), 8.8e11)
    results.add(
        "machine", cpu="a processor", cores=2, instruction_sets=["avx2"], memory_bytes=2**34, threads=2,
        system="Linux x86_64", python="3.11.7", versions={"torch": "2"}, peer_versions={"trl": "1"}, peaks=peaks,
    )  # fmt: skip
    results.add("check", name="kernels", passed=True, detail="65 comparisons")
    for seconds in (2 * foreign, 0.0):  # of a lane the turns count together
        results.add("turn", workload="A", lane="peer", foreign_seconds=seconds, idle_seconds=0.0, core_seconds=1.0)
    for each in rows:
        results.add("row", **each.to_record())
    return results


def test_a_row_shows_median_spread_goal_and_settings():
    text = render_row(row().to_record())
    for part in ("**900 tokens/s**; peak 1.50 GB", "**3.60×** [3.00–4.00]", "≥ 3.5×", "| yes |", "checkpointing off"):
        assert part in text


def test_an_unmet_goal_is_shown_as_unmet():
    assert "| **no** |" in render_row(row(ratios=(3.0,)).to_record())
    text = render_row(row(ratios=(1.2,), goal=Goal(1.05, AT_MOST), ratio_of="time").to_record())
    assert "**1.20×** the time" in text
    assert "≤ 1.05×" in text
    assert "**no**" in text


def test_a_share_is_a_percentage():
    text = render_row(row(ratios=(0.9, 0.92), goal=Goal(0.88), ratio_of="share", unit="flop/s").to_record())
    assert "**91%** [90%–92%]" in text
    assert "≥ 88%" in text


def test_a_machine_that_was_not_quiet_is_told():
    assert "not to be quoted" in render([a_run(row(), foreign=0.3)], None)
    assert "not to be quoted" not in render([a_run(row(), foreign=0.01)], None)
    assert "figures mean nothing" in render([a_run(row(), smoke=True)], None)


def test_only_workloads_that_were_measured_have_a_section():
    text = render([a_run(row("A"), row("D"))], None)
    assert "## A. One optimizer step" in text
    assert "## D. Loading" in text
    assert "## B." not in text
    assert "2 of 2 goals are met" in text


def test_of_each_workload_the_last_run_counts():
    first = a_run(row("A", ratios=(2.0,)), row("E"), date="2026-01-01 12:00 UTC")
    second = a_run(row("A", ratios=(4.0,)), date="2026-01-02 12:00 UTC")
    assert latest_of_each_workload([first, second]) == [(first, ["E"]), (second, ["A"])]
    text = render([first, second], None)
    assert "E: measured 2026-01-01" in text
    assert "A: measured 2026-01-02" in text
    assert "**4.00×**" in text
    assert "**2.00×**" not in text


def test_results_are_read_back_as_they_were_written(tmp_path):
    results = Results(tmp_path / "sub" / "run.jsonl")
    results.add("row", **row().to_record())
    results.add("note", text="µ")
    assert read_results(tmp_path / "sub" / "run.jsonl").records == results.records


def test_workloads_are_chosen_by_letter():
    assert make_options(parse_arguments(["--workloads", "e,a", "--repeats", "2"])).workloads == "AE"
    assert make_options(parse_arguments(["--repeats", "2"])).turns(3) == 2
    assert make_options(parse_arguments([])).turns(3) == 3
    assert make_options(parse_arguments(["--smoke"])).turns(3) == 1
    with pytest.raises(SystemExit):
        parse_arguments(["--workloads", "A,Z"])
