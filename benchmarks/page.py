"""docs/benchmarks.md, written from a run's results: nothing stands there that was not measured in a run it names."""

from pathlib import Path
from typing import Any

from benchmarks.figures import AT_LEAST
from benchmarks.results import Record, Results, latest_of_each_workload

NOISY_SHARE = 0.05  # of the cores, taken by others during a side's turns: above this the page warns

TITLES = {
    "A": "A. One optimizer step",
    "B": "B. A whole run",
    "C": "C. Big layers",
    "D": "D. Loading",
    "E": "E. Decoding",
    "P": "P. Kernels alone",
}
_HEAD = "| | halfbyte | compared with | ratio: median [min–max] | goal | met |\n| --- | --- | --- | --- | --- | --- |"


def render(runs: list[Results], picture: str | None) -> str:
    """The whole page, of the last run of each workload. `picture` is the plot's name beside the page."""
    chosen = latest_of_each_workload(runs)
    parts = [_opening(chosen)]
    if picture:
        parts.append(f"![Ratios of each workload, with their goals]({picture})")
    for workload, title in TITLES.items():
        for results, workloads in chosen:
            if workload in workloads:
                rows = [render_row(row) for row in results.all("row") if row["workload"] == workload]
                parts += [f"## {title}", "\n".join([_HEAD, *rows]), _tried(results, workload)]
                parts += _scripts(results) if workload == "P" else []
    for results, workloads in chosen:
        which = f" ({', '.join(workloads)})" if len(chosen) > 1 else ""
        parts += [_notes(results), _correctness(results, which), _machine(results, which)]
    return "\n\n".join(part for part in [*parts, _HOW] if part) + "\n"


def write_page(runs: list[Results], path: Path, picture: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(runs, picture), encoding="utf-8")


def render_row(row: Record) -> str:
    cells = [
        row["title"],
        _side(row["ours"], row["unit"]),
        _side(row["other"], row["unit"]) if row["other"] else "–",
        _ratios(row),
        _goal(row),
        {None: "–", True: "yes", False: "**no**"}[row["met"]],
    ]
    return f"| {' | '.join(cells)} |"


def quantity(value: float, unit: str) -> str:
    """Three digits and the unit, in the thousands that a person reads."""
    if unit == "flop/s":
        return f"{value / 1e9:,.0f} GF/s"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def _side(side: Record, unit: str) -> str:
    peak = f"; peak {side['peak_bytes'] / 1e9:.2f} GB" if side["peak_bytes"] and unit != "flop/s" else ""
    return f"**{quantity(side['value'], unit)}**{peak}<br>{side['setting']}"


def _ratios(row: Record) -> str:
    low, high = min(row["ratios"]), max(row["ratios"])
    if row["ratio_of"] == "share":
        return f"**{row['ratio']:.0%}** [{low:.0%}–{high:.0%}]"
    spread = f" [{low:.2f}–{high:.2f}]" if len(row["ratios"]) > 1 else ""
    return f"**{row['ratio']:.2f}×**{spread}{' the time' if row['ratio_of'] == 'time' else ''}"


def _goal(row: Record) -> str:
    goal = row["goal"]
    if goal is None:
        return "–"
    value = f"{goal['value']:.0%}" if row["ratio_of"] == "share" else f"{goal['value']:g}×"
    return f"{'≥' if goal['sense'] == AT_LEAST else '≤'} {value}"


def _opening(chosen: list[tuple[Results, list[str]]]) -> str:
    lines = [
        "# Benchmarks",
        "Written by `make bench`, not by hand. halfbyte and what people use today, in turn on one machine: each figure"
        " is the median of its turns; each ratio is taken within a round of turns, both sides in the same run, and"
        " given as median [min–max]. Higher is better but where it says “the time”.",
    ]
    reached = [
        row["met"] for results, workloads in chosen for row in results.all("row")
        if row["workload"] in workloads and row["met"] is not None
    ]  # fmt: skip
    for results, workloads in chosen:
        run = results.one("run")
        if run["smoke"]:
            lines.append("**A smoke run on tiny shapes: it shows that the harness works; its figures mean nothing.**")
        lines.append(f"{', '.join(workloads)}: measured {run['date']} on commit {run['commit']}. {_quiet(results)}")
    return "\n\n".join([*lines, f"{sum(reached)} of {len(reached)} goals are met."])


def _quiet(results: Results) -> str:
    foreign, idle = _worst_share(results, "foreign_seconds"), _worst_share(results, "idle_seconds")
    sentence = (
        f"During a side's turns others took at most {foreign:.0%} of the cores, the sides that waited {idle:.0%}."
    )
    if max(foreign, idle) > NOISY_SHARE:
        return f"{sentence} **That is not a quiet machine: these figures are not to be quoted.**"
    return sentence


def _worst_share(results: Results, key: str) -> float:
    """The largest share of the cores over the lanes, each lane's turns taken together: ticks are coarse for one."""
    sums: dict[tuple[str, str], list[float]] = {}
    for turn in results.all("turn"):
        lane = sums.setdefault((turn["workload"], turn["lane"]), [0.0, 0.0])
        lane[0] += turn[key]
        lane[1] += turn["core_seconds"]
    return max((max(0.0, used) / of for used, of in sums.values()), default=0.0)


def _tried(results: Results, workload: str) -> str:
    scans = [scan for scan in results.all("scan") if scan["workload"] == workload]
    if not scans:
        return ""
    lines = ["The peer's settings, each tried once; the fastest is the one compared with:", ""]
    for scan in sorted(scans, key=lambda scan: -scan.get("units_per_second", 0)):
        found = f"failed ({scan['failed']})" if "failed" in scan else f"{scan['units_per_second']:,.0f} tokens/s"
        lines.append(f"- {scan['setting']}: {found}")
    return "\n".join(lines)


def _notes(results: Results) -> str:
    return "\n".join(f"- {note['text']}" for note in results.all("note"))


def _scripts(results: Results) -> list[str]:
    return [
        f"`benchmarks/{text['name']}.py` by itself:\n\n```\n{text['text'].rstrip()}\n```"
        for text in results.all("text")
    ]


def _correctness(results: Results, which: str) -> str:
    checks = results.all("check")
    lines = [f"| {check['name']} | {check['detail']} |" for check in checks]
    return (
        f"## Checked before anything was timed{which}\n\n"
        "A red check ends the run before the first timing. “The reference” is the plain torch implementation of the"
        " same op; errors are against it in float32.\n\n| check | found |\n| --- | --- |\n" + "\n".join(lines)
    )


def _machine(results: Results, which: str) -> str:
    machine = results.one("machine")
    peaks = machine["peaks"]

    def rate(key: str, scale: float, unit: str) -> str:
        return "none" if peaks[key] is None else f"{peaks[key] / scale:,.0f} {unit}"

    rows: list[tuple[str, Any]] = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instruction_sets'])})"),
        ("memory", f"{machine['memory_bytes'] / 2**30:.0f} GiB"),
        ("threads", f"{machine['threads']} on both sides"),
        ("bf16 dot products, registers alone", rate("bf16_flops", 1e9, "GF/s")),
        ("float32 multiply-adds, registers alone", rate("float32_flops", 1e9, "GF/s")),
        ("memory, read / copied (bytes in plus out)", " / ".join(
            rate(key, 1e9, "GB/s") for key in ("read_bytes_per_second", "copy_bytes_per_second"))),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("halfbyte's environment", _versions(machine["versions"])),
        ("the peers' environment", _versions(machine["peer_versions"])),
    ]  # fmt: skip
    lines = [f"## The machine{which}\n", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


_HOW = """## How to repeat it

```
make bench                            # everything; on two cores about three quarters of an hour
make bench WORKLOADS=A,E REPEATS=5    # some of it; the page then stands beside the results in runs/bench
```

Let the machine do nothing else. `make bench` makes the peers' environment (`.peers`) if it is not there; halfbyte's own
never imports them. Each side is a process that stays alive and works only in its turn; before a turn the machine rests
for a second, for OpenMP's threads spin a while after their last work. Every turn, warm-up and setting that was tried is
a line in runs/bench/*.jsonl.

What is timed: A and C, an optimizer step with forward, backward, clipping of the gradient and AdamW, the loss over
every position on both sides. B, from the start of training, model and data being ready, to the saved adapter; both
learn the answers alone. D, from the call to a model with adapters on it, tokenizer included, the files being in the
page cache. E, `generate`, prompt included. Peak memory is the largest resident set of the side's process, libraries
included, during its turns."""
