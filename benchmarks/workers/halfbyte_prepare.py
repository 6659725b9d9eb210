"""Models that the workloads need and that are not there: random big layers, and 4-bit checkpoints for both sides."""

import shutil
from pathlib import Path

import torch
from protocol import Measure, Reply, Request, serve
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.recipes.quantize import quantize

VOCABULARY = 1000  # small, so that what is timed is the layers


def prepare(settings: Request) -> tuple[Measure, Reply]:
    torch.set_num_threads(settings["threads"])
    return _make, {}


def _make(request: Request) -> Reply:
    path = Path(request["path"])
    if request["make"] == "layers":
        _write_layers(path, Path(request["tokenizer_from"]), request["hidden"], request["intermediate"])
    else:
        quantize(request["model"], str(path), overwrite=True)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"bytes": size}


def _write_layers(path: Path, tokenizer_from: Path, hidden: int, intermediate: int) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    heads = hidden // 128
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_hidden_layers=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
        )
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, path / name)


if __name__ == "__main__":
    serve(prepare)
