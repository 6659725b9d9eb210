"""B: a whole fine-tuning run over Alpaca-like rows, from the start of training to the saved adapter.

The peer's run over all rows would take a quarter of an hour, so it goes over the first of them, as many as the table
says; useful tokens a second hardly depend on how many there are. Both sides count the same tokens: the model's own chat
template, no padding. That they do is checked before anything is timed.
"""

from typing import Any

from benchmarks.alpaca_like import write_rows
from benchmarks.bench import Bench, RedCheckError, Setting
from benchmarks.figures import compare
from benchmarks.goals import GOALS
from benchmarks.turns import Lane, Worker, alternate, workers

TURNS = 3  # each takes minutes


def measure(bench: Bench) -> None:
    sizes = bench.options.sizes
    rows = bench.options.directory / "alpaca-like.jsonl"
    write_rows(rows, sizes.rows)
    process = {"rows": str(rows), "max_length": sizes.length, "count_rows": sizes.peer_rows}
    ours = bench.start("halfbyte_run", {**process, "output_dir": str(bench.options.directory / "run-halfbyte")})
    with workers(ours):
        peer_process = {**process, "output_dir": str(bench.options.directory / "run-peer")}
        best = bench.best_setting("B", "peer_run", peer_settings(peer_process, sizes.scan_rows))
        peer = bench.start("peer_run", peer_process)
        with workers(peer):
            _same_tokens(bench, ours, peer)
            lanes = [
                Lane("halfbyte", ours, {"limit": sizes.rows}),
                Lane("peer", peer, {**best.request, "limit": sizes.peer_rows}),
            ]
            turns = alternate(lanes, bench.options.turns(TURNS), bench.options, bench.results, "B", warm_up=False)
    unsound = [turn["lane"] for lane in turns.values() for turn in lane if not turn["sound"]]
    if unsound:
        raise RedCheckError(f"red: a run of {unsound[0]} ended with a loss that is not finite or without an adapter.")
    bench.row(
        compare(
            "B",
            f"a run over Alpaca-like rows, longest {sizes.length} tokens",
            "useful tokens/s",
            (turns["halfbyte"], _words(turns["halfbyte"], sizes.rows, "by default: packed, 4 rows × 4")),
            (turns["peer"], _words(turns["peer"], sizes.peer_rows, f"TRL + bitsandbytes: {best.words}")),
            GOALS["B whole run"],
        )
    )


def peer_settings(process: dict[str, Any], scan_rows: int) -> list[Setting]:
    """What people do with TRL, and what they could do to be faster. 16 rows a step in each, as halfbyte's default."""
    usual = {"limit": scan_rows, "checkpointing": True, "micro_batch": 4, "packing": False}
    usual |= {"group_by_length": False, "autocast": True}
    faster = {**usual, "checkpointing": False}
    return [
        Setting(words, process, request)
        for words, request in (
            ("the usual recipe (checkpointing, 4 rows × 4)", usual),
            ("no checkpointing", faster),
            ("no checkpointing, rows grouped by length", {**faster, "group_by_length": True}),
            ("no checkpointing, 1 row × 16", {**faster, "micro_batch": 1}),
            ("no checkpointing, packed", {**faster, "packing": True}),
            ("no checkpointing, packed, 1 row × 16", {**faster, "packing": True, "micro_batch": 1}),
            ("no checkpointing, packed, no autocast", {**faster, "packing": True, "autocast": False}),
        )
    ]


def _same_tokens(bench: Bench, ours: Worker, peer: Worker) -> None:
    mine, theirs = ours.facts["useful_tokens"], peer.facts["useful_tokens"]
    passed = abs(mine - theirs) <= 0.01 * theirs
    detail = f"{mine:,} useful tokens by halfbyte's count, {theirs:,} by the peer's"
    bench.results.add("check", name="B: the same tokens", passed=passed, detail=detail)
    if not passed:
        raise RedCheckError(f"red: the two sides would not train on the same tokens: {detail}.")


def _words(turns: list[dict[str, Any]], rows: int, setting: str) -> str:
    return f"{setting}; {rows} rows, {turns[-1]['steps']} steps, {turns[-1]['units']:,} tokens"
