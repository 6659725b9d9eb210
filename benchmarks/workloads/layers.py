"""C: two Llama-7B-sized decoder layers, at the same checkpointing on both sides, and against the standard recipe."""

from typing import Any

from benchmarks.bench import Bench, Setting
from benchmarks.figures import compare
from benchmarks.goals import GOALS
from benchmarks.models import big_layers
from benchmarks.turns import Lane, alternate, workers
from benchmarks.workloads.step import our_setting, step_request


def measure(bench: Bench) -> None:
    sizes = bench.options.sizes
    model = {"model": str(big_layers(bench))}
    precisions = [
        Setting(words, {**model, "autocast": autocast}, step_request(1, sizes.lengths[0], 1))
        for words, autocast in (("bf16 autocast", True), ("pure bf16", False))
    ]
    best = bench.best_setting("C", "peer_step", precisions)
    ours, peer = bench.start("halfbyte_step", model), bench.start("peer_step", best.process)
    with workers(ours, peer):
        lanes = [
            Lane(_lane(side, length, checkpointing), worker, step_request(1, length, 1, checkpointing))
            for length in sizes.lengths
            for checkpointing in (False, True)
            for side, worker in (("halfbyte", ours), ("peer", peer))
        ]
        turns = alternate(lanes, bench.options.turns(3), bench.options, bench.results, "C", warm_up=False)
    for length in sizes.lengths:
        for checkpointing in (False, True):
            _row(bench, turns, length, checkpointing, checkpointing, best.words)
    for length in sizes.lengths:
        _row(bench, turns, length, False, True, best.words)


def _lane(side: str, length: int, checkpointing: bool) -> str:
    return f"{side}, {length} tokens, checkpointing {'on' if checkpointing else 'off'}"


def _row(
    bench: Bench, turns: dict[str, list[dict[str, Any]]], length: int, ours_on: bool, peer_on: bool, precision: str
) -> None:
    same = ours_on == peer_on
    ours = turns[_lane("halfbyte", length, ours_on)]
    how = f"checkpointing {'on' if ours_on else 'off'}" if same else "each by its own default"
    title = f"two layers of {bench.options.sizes.hidden}, {length} tokens, {how}"
    bench.row(
        compare(
            "C",
            title,
            "tokens/s",
            (ours, our_setting(ours, step_request(1, length, 1, ours_on))),
            (
                turns[_lane("peer", length, peer_on)],
                f"bitsandbytes + PEFT: {precision}, checkpointing {'on' if peer_on else 'off'}",
            ),
            GOALS["C same checkpointing" if same else "C standard recipe"],
        )
    )
