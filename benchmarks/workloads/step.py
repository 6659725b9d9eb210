"""A: one optimizer step of SmolLM2-135M on random tokens, its loss over every position."""

from statistics import median
from typing import Any

from benchmarks.bench import Bench, Setting
from benchmarks.figures import Row, Side, compare, side
from benchmarks.goals import GOALS
from benchmarks.turns import Lane, alternate, workers


def measure(bench: Bench) -> None:
    sizes = bench.options.sizes
    shape = f"{sizes.batch} × {sizes.length} tokens"
    best = bench.best_setting("A", "peer_step", peer_settings(sizes.batch, sizes.length))
    request = step_request(sizes.batch, sizes.length, sizes.batch)
    ours = bench.start("halfbyte_step", {})
    peer = bench.start("peer_step", best.process)
    ours_in_16_bits = bench.start("halfbyte_step", {"quant_type": "none"})
    with workers(ours, peer, ours_in_16_bits):
        lanes = [
            Lane("halfbyte", ours, request),
            Lane("peer", peer, best.request),
            Lane("halfbyte 16-bit", ours_in_16_bits, request),
        ]
        turns = alternate(lanes, bench.options.turns(), bench.options, bench.results, "A", warm_up=False)
    setting = our_setting(turns["halfbyte"], request)
    bench.row(
        compare(
            "A",
            f"a step of SmolLM2-135M, {shape}",
            "tokens/s",
            (turns["halfbyte"], setting),
            (turns["peer"], f"bitsandbytes + PEFT: {best.words}"),
            GOALS["A step"],
        )
    )
    bench.row(
        compare(
            "A",
            "the same, 4-bit against halfbyte's own 16-bit LoRA: seconds",
            "s",
            ([_per_step(turn) for turn in turns["halfbyte"]], setting),
            ([_per_step(turn) for turn in turns["halfbyte 16-bit"]], "halfbyte, quant_type none"),
            GOALS["A against our own 16 bits"],
            "time",
        )
    )
    bench.row(_first_step(turns["halfbyte"], setting))


def step_request(batch: int, length: int, micro_batch: int, checkpointing: bool = False) -> dict[str, Any]:
    return {"batch": batch, "length": length, "micro_batch": micro_batch, "checkpointing": checkpointing}


def peer_settings(batch: int, length: int) -> list[Setting]:
    """Every way that bitsandbytes + PEFT is run: the best of them is what we are compared with."""
    settings = []
    for autocast in (True, False):
        for checkpointing in (False, True):
            for micro_batch in sorted({batch, 1}, reverse=True):
                words = ", ".join(
                    (
                        "bf16 autocast" if autocast else "pure bf16",
                        f"checkpointing {'on' if checkpointing else 'off'}",
                        f"micro-batch {micro_batch}",
                    )
                )
                request = step_request(batch, length, micro_batch, checkpointing)
                settings.append(Setting(words, {"autocast": autocast}, request))
    return settings


def our_setting(turns: list[dict[str, Any]], request: dict[str, Any]) -> str:
    checkpointing = "on" if request["checkpointing"] else "off"
    return f"{turns[-1]['implementation']}, checkpointing {checkpointing}, micro-batch {request['micro_batch']}"


def _per_step(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "units": 1}


def _first_step(turns: list[dict[str, Any]], setting: str) -> Row:
    first = next(turn["first_seconds"] for turn in turns if "first_seconds" in turn)
    later = median(turn["seconds"] for turn in turns)
    return Row(
        "A",
        "halfbyte's first step against a later one: seconds",
        "s",
        Side(first, "the first step of a fresh process"),
        side([_per_step(turn) for turn in turns], "s", setting),
        [first / later],
        "time",
        GOALS["A first step"],
    )
