"""4-bit checkpoints of random weights in the shapes of Llama models, written one tensor at a time.

What a run holds does not depend on the numbers, as long as they stay finite. Codes are random bits; a block's absmax
is drawn from 0.5 to 1.5 of one value, so that weights are of the size that an untrained layer's are. The layout is
that of `halfbyte quantize`, large tensors at multiples of 64 bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte as hb
from halfbyte.checkpoint.alignment import ALIGNMENT
from halfbyte.formats import NESTED_BLOCK_SIZE
from halfbyte.huggingface import load_tokenizer
from halfbyte.quant import DoubleQuantized, QuantizedTensor, to_keys

VOCABULARY = 32_000
BLOCK_SIZE = 64
WEIGHT = 0.02  # the standard deviation
_NF4_SIZE = 0.54  # root mean square of the 16 values
_DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}

# Touvron et al. (arXiv 2302.13971), table 2: hidden size, size between, layers, heads
LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
    "tiny": (256, 688, 3, 4),  # to try the harness out
}


def write_checkpoint(directory: Path, shape: str, tokenizer_from: Path) -> None:
    """A directory that loads as a 4-bit Llama, `shape` one of LLAMA's."""
    hidden, between, layers, heads = LLAMA[shape]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
    )
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    directory.mkdir(parents=True)
    _write(directory / "model.safetensors", shapes)
    config.quantization_config = hb.QuantizationConfig(block_size=BLOCK_SIZE).to_dict()
    config.save_pretrained(directory)
    _write_tokenizer(directory, tokenizer_from)


def checkpoint_bytes(shape: str) -> int:
    """What `write_checkpoint` writes, all but exactly."""
    hidden, between, layers, _ = LLAMA[shape]
    in_4_bits = layers * (4 * hidden**2 + 3 * hidden * between)
    return round(in_4_bits * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * 2 * VOCABULARY * hidden) + (16 << 20)


def _write(file: Path, shapes: dict[str, torch.Size]) -> None:
    """One tensor's values are in memory at a time; sizes are known before there are any."""
    whole, rest = [], []
    for name, shape in shapes.items():
        for key, tensor in _tensors(name, shape, None):
            entry = (name, key, _DTYPES[tensor.dtype], list(tensor.shape), tensor.nbytes)
            (rest if tensor.nbytes % ALIGNMENT else whole).append(entry)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for _, key, dtype, shape, size in whole + rest:
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    rng = np.random.Generator(np.random.SFC64(0))
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for key, tensor in _tensors(name, shape, rng):
                target.seek(start + header[key]["data_offsets"][0])
                target.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _tensors(name: str, shape: torch.Size, rng: np.random.Generator | None) -> Iterator[tuple[str, Tensor]]:
    """A weight's tensors by their names in the file; without values where `rng` is None."""
    if "_proj" not in name:
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        elif rng is None:
            yield name, torch.empty(shape, dtype=torch.bfloat16)
        else:
            yield name, torch.from_numpy(rng.standard_normal(shape, np.float32)).mul_(WEIGHT).bfloat16()
        return
    blocks = shape.numel() // BLOCK_SIZE
    offset = float(np.float32(WEIGHT / _NF4_SIZE))
    nested = torch.full((-(-blocks // NESTED_BLOCK_SIZE),), offset / 2)
    absmax = DoubleQuantized(_bytes(rng, blocks), nested, offset)
    codes = _bytes(rng, shape.numel() // 2).view(-1, 1)
    yield name, codes
    keys = to_keys(QuantizedTensor(codes, absmax, shape, torch.bfloat16, "nf4", BLOCK_SIZE))
    yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in keys.items())


def _bytes(rng: np.random.Generator | None, count: int) -> Tensor:
    if rng is None:
        return torch.empty(count, dtype=torch.uint8)
    words = rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8)[:count])


def _write_tokenizer(directory: Path, tokenizer_from: Path) -> None:
    """Another model's, with the first VOCABULARY of its tokens: in a byte-pair encoding those need no others."""
    load_tokenizer(str(tokenizer_from)).save_pretrained(directory)
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: place for token, place in model["vocab"].items() if place < VOCABULARY}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
