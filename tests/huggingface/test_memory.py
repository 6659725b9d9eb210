"""Loading holds one tensor in 16 bits at a time: the peak of a fresh process, over one that only imports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte import Linear4bit, load_model
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
