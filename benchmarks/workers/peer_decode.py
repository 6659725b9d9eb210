"""transformers, in bf16 or with bitsandbytes: greedy decoding at batch 1 (workload E)."""

import time

import torch
from peer_model import load
from protocol import Measure, Reply, Request, serve
from transformers import AutoTokenizer


def prepare(settings: Request) -> tuple[Measure, Reply]:
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = load(settings).eval()
    model.generation_config.eos_token_id = None  # nothing ends the text early

    @torch.no_grad()
    def measure(request: Request) -> Reply:
        started = time.perf_counter()
        prompt = tokenizer(request["prompt"], add_special_tokens=False, return_tensors="pt")
        written = model.generate(
            **prompt, max_new_tokens=request["new_tokens"], do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "units": written.shape[1] - prompt["input_ids"].shape[1]}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
