"""Tiny models of the families that are written as GGUF, each with a tokenizer of the kind that the family has."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from models import CHATML, build_model
from tokenizers_like import build_byte_level, build_sentencepiece_like

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / ".llama" / "bin" / "python"
WORKER = ROOT / "benchmarks" / "workers" / "llama_cpp_greedy.py"
TURNS = ("<|im_start|>", "<|im_end|>")
_SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA_3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}

# name -> model_type and what is beside the sizes
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, rope of Llama 3": ("llama", {"rope_parameters": _LLAMA_3 | {"original_max_position_embeddings": 64}}),
    "llama, linear rope": ("llama", {"rope_parameters": _SCALED | {"rope_type": "linear"}}),
    "llama, yarn": ("llama", {"rope_parameters": _SCALED | {"rope_type": "yarn"}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads, tied": ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # which transformers takes all of them to have
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {}),
    "phi3, part of a head": ("phi3", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "phi3, longrope": (
        "phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": _LONG
            | {"rope_theta": 1e4, "rope_type": "longrope", "original_max_position_embeddings": 256},
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
}
_SENTENCEPIECE = ("mistral", "phi3")


def build_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    if model_type.startswith("gemma"):  # what transformers gives such a tokenizer if it has it not
        own = ("<unk>", "<bos>", "<eos>")
        return build_sentencepiece_like(CHATML, ("<pad>", "<mask>", *TURNS), prefix=False, names=own)
    if model_type in _SENTENCEPIECE:
        return build_sentencepiece_like(CHATML, TURNS)
    split = {"qwen2": "qwen2", "qwen3": "qwen2", "smollm3": "llama-bpe"}.get(model_type, "smollm")
    return build_byte_level(CHATML, (*TURNS, "<|endoftext|>", "<pad>"), split, ignore_merges=split == "llama-bpe")


def save_family(name: str, directory: Path, **changes: Any) -> PreTrainedModel:
    """Write the model in float32; sizes are multiples of 32."""
    model_type, settings = FAMILIES[name]
    tokenizer = build_tokenizer(model_type)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    values = {"vocab_size": len(tokenizer), "intermediate_size": 64, **ids, **settings, **changes}
    model = build_model(model_type, torch.float32, **values)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def llama_cpp(model: Path, **task: Any) -> Any:
    """What llama.cpp says of a file; skips where the environment is not there."""
    if not LLAMA.exists():
        pytest.skip("llama-cpp-python is not there: make llama builds it into .llama")
    given = json.dumps({"model": str(model), "prompts": [], "threads": 1, **task})
    done = subprocess.run([LLAMA, WORKER], input=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
