"""A 4-bit checkpoint mapped and copied: seconds to open it, and to take a step with its pages in memory and on disk.

    python -m benchmarks.paging CHECKPOINT [--make 8 --tokenizer_from MODEL] [--tokens 128] [--rounds 3] [--threads N]

With --make, a checkpoint of so many Llama-7B-sized layers with random codes is written to CHECKPOINT first. A step is
forward and backward of one row through rank-16 adapters on everything. "evicted" is a step after every page of the
files was dropped from memory, with the next layer's asked for ahead and without.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import halfbyte as hb
from halfbyte.checkpoint.alignment import align_tensors
from halfbyte.huggingface import load as loading
from halfbyte.huggingface.prefetch import Prefetcher
from halfbyte.nn import supervised_loss
from halfbyte.quant import DoubleQuantized, QuantizedTensor, to_keys


def make_checkpoint(directory: Path, layers: int, tokenizer_from: str) -> None:
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    tensors = {}
    for name, shape in shapes.items():
        if "_proj" not in name:
            tensors[name] = torch.full(shape, 1.0, dtype=torch.bfloat16) if len(shape) == 1 else noise(shape)
            continue
        absmax = DoubleQuantized.from_absmax(torch.rand(shape.numel() // 64) * 0.02)
        codes = torch.randint(256, (shape.numel() // 2, 1), dtype=torch.uint8)
        tensors[name] = codes
        keys = to_keys(QuantizedTensor(codes, absmax, shape, torch.bfloat16, "nf4", 64))
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in keys.items()}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    align_tensors(directory / "model.safetensors")
    config.quantization_config = hb.QuantizationConfig().to_dict()
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)


def noise(shape: torch.Size) -> torch.Tensor:
    row = torch.randn(shape[1]) * 0.02
    return torch.stack([row.roll(index) for index in range(64)]).repeat(shape[0] // 64, 1).bfloat16()


def open_model(directory: Path, mapped: bool, fast: bool) -> tuple[torch.nn.Module, Prefetcher | None]:
    """The model, and what makes its requests."""
    made: list[Prefetcher | None] = [None]
    original = loading.prefetch_layers

    def keep(*arguments: object) -> Prefetcher | None:
        made.append(original(*arguments))  # type: ignore[arg-type]
        return made[-1]

    loading.prefetch_layers = keep  # type: ignore[assignment]
    try:
        model, _ = hb.load_model(str(directory), mapped=mapped, fast=fast)
    finally:
        loading.prefetch_layers = original
    return model, made[-1]


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    supervised_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def evicted(prefetcher: Prefetcher, ahead: bool, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of a step that begins with nothing in memory."""
    for file in prefetcher._files:
        file.evict()
    request = prefetcher._request
    if not ahead:
        prefetcher._request = lambda _place: None  # type: ignore[method-assign]
    try:
        return seconds(partial(step, model, batch))
    finally:
        prefetcher._request = request  # type: ignore[method-assign]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def show(name: str, times: list[float]) -> None:
    print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--make", type=int, default=0)
    parser.add_argument("--tokenizer_from", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.make:
        make_checkpoint(options.checkpoint, options.make, options.tokenizer_from)
    size = (options.checkpoint / "model.safetensors").stat().st_size
    print(f"{size:,} bytes, {options.threads} threads\n\n| | s: median | least |\n| --- | --- | --- |")
    for fast in (False, True):
        opened: dict[str, list[float]] = {"mapped": [], "copied": []}
        for _ in range(options.rounds):
            for name, times in opened.items():
                times.append(seconds(partial(open_model, options.checkpoint, name == "mapped", fast)))
        for name, times in opened.items():
            show(f"open, {name}, {'halfbyte' if fast else 'the model'}'s own operations", times)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    mapped, prefetcher = open_model(options.checkpoint, mapped=True, fast=True)
    models = {"mapped": hb.add_lora(mapped, lora)}
    models["copied"] = hb.add_lora(open_model(options.checkpoint, mapped=False, fast=True)[0], lora)
    ids = torch.randint(1000, (1, options.tokens))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["position_ids"] = torch.arange(options.tokens)[None]
    warm: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(options.rounds + 1):
        for name, model in models.items():
            taken = seconds(partial(step, model, batch))
            warm[name] += [taken] if round_number else []
    for name, times in warm.items():
        show(f"step, {name}, in memory", times)
    if prefetcher is not None:
        cold: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.rounds):
            for ahead, times in cold.items():
                times.append(evicted(prefetcher, ahead, models["mapped"], batch))
        for ahead, times in cold.items():
            show(f"step, mapped, evicted, {'asked for ahead' if ahead else 'not asked for'}", times)


if __name__ == "__main__":
    main()
