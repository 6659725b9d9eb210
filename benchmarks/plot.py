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

OURS, MISSED, GOAL = "#2a6f97", "#b08968", "#222222"


def main() -> None:
    # Shares of a peak are no ratios between two sides, and a row without a goal says less than the table does.
    rows = [row for row in json.load(sys.stdin) if row["goal"] and row["ratio_of"] == "speed"]
    if not rows:
        sys.exit("there is no ratio with a goal in these results, so nothing to draw")
    draw(rows, Path(sys.argv[1]))


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 0.9 + 0.55 * len(rows)), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [r["ratio"] for r in rows], color=[OURS if r["met"] else MISSED for r in rows], height=0.6)
    for place, row in zip(places, rows, strict=True):
        axes.plot([min(row["ratios"]), max(row["ratios"])], [place, place], color=GOAL, linewidth=1.2)
        goal = row["goal"]["value"]
        axes.plot([goal, goal], [place - 0.42, place + 0.42], color=GOAL, linewidth=2.2)
        axes.text(max(row["ratios"]) * 1.03, place, f"{row['ratio']:.1f}×", va="center", fontsize=9)
    axes.set_yticks(places, [f"{r['workload']}  {r['title']}" for r in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if t <= 2 * max(r["ratio"] for r in rows)]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(right=1.35 * max(max(*r["ratios"], r["goal"]["value"], r["ratio"]) for r in rows))
    axes.axvline(1, color="#999999", linewidth=1, zorder=0)
    axes.set_xlabel("times as fast as the best of today's usual stack; bold mark: the goal; thin line: min–max")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
