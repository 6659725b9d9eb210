"""halfbyte: one optimizer step on random tokens (workloads A and C)."""

import time
from typing import Any

import torch
from halfbyte_model import executed, load, put_adapters_on, set_checkpointing, supervise_all
from protocol import Measure, Reply, Request, serve

import halfbyte as hb
from halfbyte.recipes.training import train_step


def prepare(settings: Request) -> tuple[Measure, Reply]:
    model, _ = load(settings)
    model = put_adapters_on(model)
    optimizer = hb.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    seen: set[tuple[Any, ...]] = set()

    def measure(request: Request) -> Reply:
        batch, length = request["batch"], request["length"]
        set_checkpointing(model, request["checkpointing"])
        torch.manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (batch, length))
        micro_batches = [supervise_all(rows) for rows in ids.split(request["micro_batch"])]

        def step() -> float:
            started = time.perf_counter()
            train_step(model, optimizer, micro_batches, 2e-4, 0.3, torch.device("cpu"))
            return time.perf_counter() - started

        reply: Reply = {}
        key = (batch, length, request["micro_batch"], request["checkpointing"])
        if key not in seen:  # the first step of a shape also sets things up; it is reported, not counted
            seen.add(key)
            reply["first_seconds"] = step()
        return {
            **reply,
            "seconds": step(),
            "units": batch * length,
            "implementation": executed(),
        }

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
