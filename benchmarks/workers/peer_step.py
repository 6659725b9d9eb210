"""bitsandbytes + PEFT: one optimizer step on random tokens (workloads A and C)."""

import contextlib
import time
from typing import Any

import torch
from peer_model import load, put_adapters_on
from protocol import Measure, Reply, Request, serve


def prepare(settings: Request) -> tuple[Measure, Reply]:
    autocast = settings["autocast"]
    model = put_adapters_on(load(settings), autocast).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    seen: set[tuple[Any, ...]] = set()

    def step(micro_batches: tuple[torch.Tensor, ...]) -> float:
        started = time.perf_counter()
        for ids in micro_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids).loss
            (loss / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    def measure(request: Request) -> Reply:
        batch, length = request["batch"], request["length"]
        if request["checkpointing"]:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        torch.manual_seed(0)
        micro_batches = torch.randint(0, model.config.vocab_size, (batch, length)).split(request["micro_batch"])
        reply: Reply = {}
        key = (batch, length, request["micro_batch"], request["checkpointing"])
        if key not in seen:
            seen.add(key)
            reply["first_seconds"] = step(micro_batches)
        return {**reply, "seconds": step(micro_batches), "units": batch * length}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
