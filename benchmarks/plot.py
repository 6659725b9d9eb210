"""The ratios of a run as a picture: a bar a row, its spread, and the goal.

    python benchmarks/plot.py PICTURE.png < ROWS.json

The rows are those of benchmarks/results.py. It needs matplotlib (benchmarks/requirements.txt), which halfbyte does
not: `make bench` runs it with the peers' interpreter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

OURS, MISSED, GOAL = "#2a6f97", "#b08968", "#222222"


def main() -> None:
    # Shares of a peak are no ratios between two sides, and a row without a goal says less than the table does.
    rows = [row for row in json.load(sys.stdin) if row["goal"] and row["ratio_of"] == "speed"]
    if not rows:
        sys.exit("there is no ratio with a goal in these results, so nothing to draw")
    draw(rows, Path(sys.argv[1]))


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.5 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        ratio, low, high, goal = row["ratio"], min(row["ratios"]), max(row["ratios"]), row["goal"]["value"]
        # From 1, "as fast as the others": on a logarithmic axis a bar has no other place to begin.
        axes.barh(place, ratio - 1, left=1, color=OURS if row["met"] else MISSED, height=0.6)
        axes.plot([low, high], [place, place], color=GOAL, linewidth=1.2)
        axes.plot([goal, goal], [place - 0.42, place + 0.42], color=GOAL, linewidth=2.2)
        axes.text(1.04 * max(high, goal, 1), place, f"{ratio:.1f}× (goal {goal:g}×)", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{row['workload']}  {row['title']}" for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ends = [value for row in rows for value in (*row["ratios"], row["goal"]["value"], 1)]
    axes.set_xlim(0.9 * min(ends), 1.6 * max(ends))
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if min(ends) <= tick <= 1.6 * max(ends)]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="#999999", linewidth=1, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    key = [
        Patch(color=OURS, label="halfbyte, goal met"),
        Patch(color=MISSED, label="halfbyte, goal not met"),
        Line2D([], [], color=GOAL, linewidth=2.2, label="goal"),
        Line2D([], [], color=GOAL, linewidth=1.2, label="least to most over the rounds"),
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False, fontsize=9)
    figure.suptitle("Times as fast as the best of today's usual stack, in the same run", fontsize=11)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
