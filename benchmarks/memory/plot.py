"""A bar a run, by part as planned, and beside it what was measured.

    python benchmarks/memory/plot.py PICTURE.png < RECORDS.json

It needs matplotlib, which halfbyte does not: the peers' interpreter has it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

PARTS = {
    "process": "#8d99ae",
    "4-bit weights": "#2a6f97",
    "16-bit remainder": "#61a5c2",
    "adapters": "#b5838d",
    "gradients": "#e5989b",
    "optimizer state": "#ffb4a2",
    "activations": "#e9c46a",
    "temporaries": "#f4a261",
}
ANONYMOUS, PAGES = "#444444", "#bbbbbb"


def main() -> None:
    records = json.load(sys.stdin)
    if not records:
        sys.exit("nothing was measured, so there is nothing to draw")
    groups = [[r for r in records if r["planned_bytes"] < 3e9], [r for r in records if r["planned_bytes"] >= 3e9]]
    groups = [group for group in groups if group]
    heights = [len(group) for group in groups]
    figure, every = plt.subplots(
        len(groups), 1, figsize=(12, 1.5 + 0.62 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    for axes, group in zip(every if len(groups) > 1 else [every], groups, strict=True):
        draw(axes, group)
    handles = {label: bar for axes in figure.axes for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("The most that a run held, GB: planned by part (upper bar), measured (lower)", fontsize=11)
    figure.savefig(Path(sys.argv[1]), dpi=110)


def draw(axes: Any, records: list[dict[str, Any]]) -> None:
    for place, record in enumerate(records):
        left = 0.0
        for part, colour in PARTS.items():
            size = record["plan"]["parts"][part] / 1e9
            label = part if place == 0 else None
            axes.barh(place - 0.19, size, left=left, color=colour, height=0.36, label=label)
            left += size
        pages = (record["resident_bytes"] - record["anonymous_bytes"]) / 1e9
        anonymous = record["anonymous_bytes"] / 1e9
        labels = ("measured: pages of files", "measured: anonymous") if place == 0 else (None, None)
        axes.barh(place + 0.19, pages, color=PAGES, height=0.36, label=labels[0])
        axes.barh(place + 0.19, anonymous, left=pages, color=ANONYMOUS, height=0.36, label=labels[1])
    axes.set_yticks(range(len(records)), [record["name"].replace("gradient_checkpointing", "gc") for record in records])
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
