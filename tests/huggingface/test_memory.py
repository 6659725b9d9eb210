"""What loading takes, in fresh processes.

From 16 bits: one tensor in 16 bits at a time, over what importing takes. From 4 bits: next to nothing, since the
weights are pages of a file, which processes share.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte import Linear4bit, load_model
from halfbyte.recipes.quantize import quantize
from models import build_tokenizer

MEGABYTE = 1 << 20
SLACK = 300 * MEGABYTE

MEASURE = """
import json, resource, sys
import halfbyte, torch
from halfbyte.nn import Linear4bit
halfbyte.load_model, halfbyte.QuantizationConfig  # what a caller imports in any case
def resident(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = resident()
model = halfbyte.load_model(sys.argv[1])[0] if len(sys.argv) > 1 else None
held = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) if model else 0
print(json.dumps({"before": before, "peak": resident(), "held": held}))
"""


def measure(*arguments: str) -> dict[str, int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", MEASURE, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    measured: dict[str, int] = json.loads(ran.stdout)
    return measured


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.6 GB in 16 bits, in shards of one layer: cheap to make, since every layer has the same random numbers."""
    directory = tmp_path_factory.mktemp("large")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=259,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=18,
        num_attention_heads=16,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    noise = torch.randn(4096 * 1024, dtype=torch.float32).mul_(0.02).bfloat16()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = noise[: shape.numel()].view(shape).clone()
    for file, tensors in shards.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def test_a_large_model_in_shards(large_model: Path) -> None:
    size = sum(file.stat().st_size for file in large_model.glob("*.safetensors"))
    assert size > 570 * MEGABYTE
    measured = measure(str(large_model))
    largest = 4096 * 1024 * 2
    assert measured["held"] < 0.27 * size
    assert measured["peak"] - measured["before"] <= measured["held"] + 2 * largest + SLACK
    # The bound above would let half of the model through in 16 bits; what is really kept back is far less.
    assert measured["peak"] - measured["before"] <= measured["held"] + 2 * largest + 100 * MEGABYTE


def test_the_real_model(smollm2_directory: Path) -> None:
    measured = measure(str(smollm2_directory))
    largest = 49152 * 576 * 2
    assert measured["peak"] - measured["before"] <= measured["held"] + 2 * largest + SLACK


def test_nothing_of_the_16_bit_weights_is_kept(model_directory: Callable[[str], Path]) -> None:
    model, _ = load_model(str(model_directory("llama")))
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            n = layer.in_features * layer.out_features
            held = sum(tensor.untyped_storage().nbytes() for tensor in (*layer.parameters(), *layer.buffers()))
            assert held <= n / 2 + n / 64 + 4 * (n // (64 * 256) + 1)


# ── From a 4-bit checkpoint ─────────────────────────────────────────────────────────────────────────────────


OPEN = """
import json, resource, sys
from pathlib import Path
import halfbyte, torch
halfbyte.load_model, halfbyte.QuantizationConfig
def status(key):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":")]
    return int(line.split()[1]) * 1024
def in_pages_of(file):
    inside, sums = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = line.endswith(file)
        elif inside and rest[-1:] == ["kB"]:
            sums[key[:-1]] = sums.get(key[:-1], 0) + int(rest[0]) * 1024
    return sums
directory, mapped, room = sys.argv[1], sys.argv[2] == "mapped", int(sys.argv[3])
before = status("RssAnon"), status("RssFile")
if room:
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + room,) * 2)
model, _ = halfbyte.load_model(directory, fast=False, mapped=mapped)
opened = {"anonymous": status("RssAnon") - before[0], "file": status("RssFile") - before[1]}
total = sum(int(p.detach().view(torch.uint8).numpy().sum()) for p in model.parameters())
read = {"anonymous": status("RssAnon") - before[0], "file": status("RssFile") - before[1]}
print(json.dumps({"opened": opened, "read": read, "sum": total}), flush=True)
for _ in sys.stdin:
    print(json.dumps(in_pages_of(directory + "/model.safetensors")), flush=True)
"""


def start(directory: Path, how: str = "mapped", room: int = 0) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OPEN, str(directory), how, str(room)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return json.loads(line)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def large_checkpoint(large_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bits: 157 MB."""
    directory = tmp_path_factory.mktemp("large-nf4").resolve() / "nf4"
    quantize(str(large_model), str(directory))
    return directory


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="there is no /proc/self/smaps to read")


@needs_proc
def test_a_4_bit_checkpoint_is_not_copied_and_processes_share_it(large_checkpoint: Path) -> None:
    size = (large_checkpoint / "model.safetensors").stat().st_size
    assert size > 140 * MEGABYTE
    with start(large_checkpoint) as first, start(large_checkpoint) as second:
        measured = [said(first), said(second)]
        assert measured[0]["sum"] == measured[1]["sum"]
        for told in measured:
            assert told["opened"]["anonymous"] < 30 * MEGABYTE
            assert told["opened"]["file"] < 30 * MEGABYTE  # code, and the embeddings, which are looked at for a NaN
            assert told["read"]["anonymous"] < 30 * MEGABYTE
            assert told["read"]["file"] > 0.95 * size
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for pages in (said(first), said(second)):
            assert pages["Rss"] > 0.95 * size
            assert pages["Pss"] < 0.55 * size  # each page is half of each process's
            assert pages["Private_Dirty"] == pages["Shared_Dirty"] == pages["Anonymous"] == 0
        first.communicate()
        second.communicate()
    with start(large_checkpoint, "copied") as process:
        told = said(process)
        assert told["sum"] == measured[0]["sum"]
        assert told["opened"]["anonymous"] > 0.9 * size  # the measure sees a copy
        process.communicate()


@needs_proc
def test_weights_need_no_data_of_the_process_own(large_checkpoint: Path) -> None:
    """RLIMIT_DATA bounds what a process may have for itself; two thirds of the weights are room enough."""
    room = 100 * MEGABYTE
    with start(large_checkpoint, "mapped", room) as process:
        assert said(process)["sum"] > 0
        process.communicate()
    with start(large_checkpoint, "copied", room) as process:
        _, complaint = process.communicate()
    assert process.returncode != 0
    assert "memory" in complaint.lower()
