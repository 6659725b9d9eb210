"""halfbyte: from a model's files to a 4-bit model ready to train (workload D)."""

import gc
import time

import torch
from halfbyte_model import executed, put_adapters_on
from protocol import Measure, Reply, Request, serve

import halfbyte as hb


def prepare(settings: Request) -> tuple[Measure, Reply]:
    torch.set_num_threads(settings["threads"])

    def measure(request: Request) -> Reply:
        gc.collect()
        started = time.perf_counter()
        model, _ = hb.load_model(request["model"])
        put_adapters_on(model)
        return {"seconds": time.perf_counter() - started, "units": 1, "implementation": executed()}

    return measure, {}


if __name__ == "__main__":
    serve(prepare)
