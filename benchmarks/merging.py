"""A merge of a model of Llama-7B-sized layers beside a plain copy of its files: seconds, and the most memory.

    python -m benchmarks.merging DIRECTORY --tokenizer_from MODEL [--layers 32] [--base original] [--dtype nf4]

The model has random weights and is written to DIRECTORY, with the adapter, and both are left there. The copy reads
and writes the same bytes in pieces of 16 MB and waits for the disk, as the merge does; both begin with no page of the
files in memory. With 32 layers it takes 41 GB of disk, and where that is not there it says so and stops.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.paging import noise
from halfbyte.checkpoint.shards import ShardWriter
from halfbyte.huggingface.safetensors_files import safetensors_files

PIECE = 16 << 20
SHARD_BYTES = 5_000_000_000
MERGE = """
import json, sys, time, halfbyte
result = halfbyte.merge(sys.argv[1], sys.argv[2], sys.argv[3], base=sys.argv[4], dtype=sys.argv[5])
busy = time.process_time()
print(json.dumps({"seconds": result.seconds, "busy_seconds": busy, "peak_bytes": result.peak_bytes}))
"""


def make_model(directory: Path, layers: int, tokenizer_from: str) -> None:
    config = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers)
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    needed = 2 * sum(shape.numel() for shape in shapes.values())
    free = shutil.disk_usage(directory.parent).free
    if free < 3.1 * needed:
        sys.exit(f"skipped: {3.1 * needed / 1e9:.0f} GB of disk are needed, and {free / 1e9:.0f} GB are there")
    directory.mkdir()
    with ShardWriter(directory, SHARD_BYTES, len(shapes), 80) as writer:
        for name, shape in shapes.items():
            writer.add(name, torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else noise(shape))
    config.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)


def make_adapter(directory: Path, layers: int, rank: int) -> None:
    names = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    sizes = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    tensors = {}
    for layer in range(layers):
        for part, projections in names.items():
            for projection in projections:
                rows, columns = sizes.get(projection, (4096, 4096))
                prefix = f"base_model.model.model.layers.{layer}.{part}.{projection}"
                tensors[f"{prefix}.lora_A.weight"] = 0.01 * torch.randn(rank, columns)
                tensors[f"{prefix}.lora_B.weight"] = 0.01 * torch.randn(rows, rank)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(directory)


def evict(directory: Path) -> None:
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_seconds(directory: Path, target: Path | None) -> float:
    """Read a model's files in pieces, and write them to `target`, if there is one, and wait for the disk."""
    if target is not None:
        target.mkdir()
    evict(directory)
    started = time.perf_counter()
    for file in safetensors_files(directory):
        written = Path(os.devnull) if target is None else target / file.name
        with file.open("rb", buffering=0) as source, written.open("wb") as copy:
            while piece := source.read(PIECE):
                if target is not None:
                    copy.write(piece)
            if target is not None:
                copy.flush()
                os.fsync(copy.fileno())
    seconds = time.perf_counter() - started
    if target is not None:
        shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer_from", required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="quantized", choices=["original", "quantized"])
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    directory = arguments.directory
    model, adapter = directory / f"model-{arguments.layers}", directory / f"adapter-{arguments.layers}"
    directory.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        make_model(model, arguments.layers, arguments.tokenizer_from)
        make_adapter(adapter, arguments.layers, arguments.rank)
    largest = max(file.stat().st_size for file in safetensors_files(model))
    reading, copying = disk_seconds(model, None), disk_seconds(model, directory / "copy")
    evict(model)
    output = directory / "merged"
    command = [sys.executable, "-c", MERGE, str(model), str(adapter), str(output), arguments.base, arguments.dtype]
    merged = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shutil.rmtree(output)
    size = sum(file.stat().st_size for file in safetensors_files(model))
    print(f"{size / 1e9:.2f} GB of weights; the largest file has {largest / 1e9:.2f} GB")
    print(f"the disk: read in {reading:.1f} s, {size / reading / 1e9:.2f} GB/s; read and written in {copying:.1f} s")
    print(
        f"merged in {merged['seconds']:.1f} s, {merged['seconds'] / copying:.2f} times the copy;"
        f" the process was busy for {merged['busy_seconds']:.1f} s ({arguments.base}, {arguments.dtype})"
    )
    print(f"the merging process held at most {merged['peak_bytes'] / 1e9:.2f} GB, Python and torch included")
    if merged["peak_bytes"] > largest + 1e9:
        sys.exit("that is more than the largest file and 1 GB")


if __name__ == "__main__":
    main()
