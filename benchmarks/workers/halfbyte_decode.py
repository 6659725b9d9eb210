"""halfbyte: greedy decoding at batch 1, as `halfbyte generate` does it (workload E)."""

import time

from halfbyte_model import executed, load, write_greedily
from protocol import Measure, Reply, Request, serve


def prepare(settings: Request) -> tuple[Measure, Reply]:
    model, tokenizer = load(settings)

    def measure(request: Request) -> Reply:
        started = time.perf_counter()
        written = write_greedily(model, tokenizer, request["prompt"], request["new_tokens"])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "units": len(written), "implementation": executed()}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
