"""transformers, in bf16 or with bitsandbytes: greedy decoding at batch 1 (workload E)."""

import time

import torch
from peer_model import load
from protocol import Measure, Reply, Request, serve


def prepare(settings: Request) -> tuple[Measure, Reply]:
    model = load(settings).eval()
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def measure(request: Request) -> Reply:
        torch.manual_seed(0)
        prompt = torch.randint(0, model.config.vocab_size, (1, request["prompt_tokens"]))
        started = time.perf_counter()
        written = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["new_tokens"],
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "units": written.shape[1] - prompt.shape[1]}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
