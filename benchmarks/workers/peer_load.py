"""transformers + bitsandbytes + PEFT: from a model's files to a 4-bit model ready to train (workload D)."""

import gc
import time

import torch
from peer_model import from_pretrained, put_adapters_on
from protocol import Measure, Reply, Request, serve
from transformers import AutoTokenizer


def prepare(settings: Request) -> tuple[Measure, Reply]:
    torch.set_num_threads(settings["threads"])

    def measure(request: Request) -> Reply:
        gc.collect()
        started = time.perf_counter()
        AutoTokenizer.from_pretrained(request["model"])  # halfbyte's loader brings the tokenizer too
        # A 4-bit checkpoint says in its own config.json how it is to be read.
        model = from_pretrained(request["model"], quantize=request["quantize"])
        put_adapters_on(model, autocast=True)
        return {"seconds": time.perf_counter() - started, "units": 1}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
