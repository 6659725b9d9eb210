"""E: greedy decoding of SmolLM2-135M at batch 1; the goal is against the faster of the two peers."""

from statistics import median
from typing import Any

from benchmarks.bench import Bench
from benchmarks.figures import compare
from benchmarks.goals import GOALS
from benchmarks.turns import Lane, alternate, workers

PEERS = {"transformers, bf16": False, "transformers + bitsandbytes, NF4": True}


def measure(bench: Bench) -> None:
    sizes = bench.options.sizes
    request = {"prompt": sizes.prompt, "new_tokens": sizes.new_tokens}
    ours = bench.start("halfbyte_decode", {})
    peers = {name: bench.start("peer_decode", {"quantize": quantize}) for name, quantize in PEERS.items()}
    with workers(ours, *peers.values()):
        lanes = [Lane("halfbyte", ours, request), *(Lane(name, peer, request) for name, peer in peers.items())]
        turns = alternate(lanes, bench.options.turns(), bench.options, bench.results, "E")
    faster = min(PEERS, key=lambda name: median(_seconds_a_token(turn) for turn in turns[name]))
    for name in PEERS:
        bench.row(
            compare(
                "E",
                f"{sizes.new_tokens} tokens after a short prompt, greedy, batch 1",
                "tokens/s",
                (turns["halfbyte"], str(turns["halfbyte"][-1]["implementation"])),
                (turns[name], name),
                GOALS["E decode"] if name == faster else None,
            )
        )


def _seconds_a_token(turn: dict[str, Any]) -> float:
    return float(turn["seconds"] / turn["units"])
