"""decode_token: no further from float64 than the reference, in every implementation, at awkward sizes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import CODEBOOKS_16, assert_no_worse, by_reference
from torch import Tensor

from halfbyte import ops
from halfbyte.ops import DecodeLayer, DecodeLinear, DecodeModel, Nested
from halfbyte.quant import DoubleQuantized, codebook_8bit, quantize_4bit

VOCABULARY = 101


RANKS = (16, 0, 48, 32)  # of one layer after the other, where there are adapters


def build_linear(out: int, into: int, nested: bool, bias: bool, rank: int, block_size: int) -> DecodeLinear:
    weight = quantize_4bit(torch.randn(out, into) * into**-0.5, "nf4", block_size, nested)
    absmax = weight.absmax
    constants = None
    if isinstance(absmax, DoubleQuantized):
        constants = Nested(absmax.absmax, codebook_8bit(torch.device("cpu")), absmax.offset)
        absmax = absmax.codes
    lora = None
    if rank:
        lora_A, lora_B = (torch.randn(rank, into) * into**-0.5).bfloat16(), (torch.randn(out, rank) / 8).bfloat16()
        lora = lora_A, lora_B
    return DecodeLinear(
        weight.packed,
        absmax,
        constants,
        CODEBOOKS_16["nf4"],
        block_size,
        (out, into),
        torch.randn(out) if bias else None,
        lora,
    )


def build(
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    nested: bool = True,
    bias: bool = False,
    lora: bool = False,
    block_size: int = 64,
    head_norms: bool = False,
) -> DecodeModel:
    queries, cached = heads * head_dim, kv_heads * head_dim
    shapes = [
        *((queries, hidden), (cached, hidden), (cached, hidden), (hidden, queries)),
        *((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)),
    ]
    ranks = itertools.cycle(RANKS)
    layers = tuple(
        DecodeLayer(
            torch.rand(hidden) + 0.5,
            torch.rand(hidden) + 0.5,
            *(build_linear(out, into, nested, bias, next(ranks) if lora else 0, block_size) for out, into in shapes),
            *(torch.rand(2, head_dim) + 0.5 if head_norms else ()),
        )
        for _ in range(3)
    )
    embedding, head = torch.randn(2, VOCABULARY, hidden).bfloat16()
    return DecodeModel(
        layers, torch.rand(hidden) + 0.5, embedding, head, heads, kv_heads, head_dim, 1e-5, head_dim**-0.5
    )


def exact(model: DecodeModel, token: int, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int) -> Tensor:
    """In float64 without a rounding but the weights'; written apart from the reference."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape, weight.double(), model.epsilon)

    def apply(linear: DecodeLinear, x: Tensor) -> Tensor:
        absmax = linear.absmax
        if linear.nested is not None:
            absmax = DoubleQuantized(absmax, linear.nested.absmax, linear.nested.offset).dequantize()
        arguments = linear.packed, absmax, linear.codebook, linear.block_size, list(linear.shape), torch.bfloat16
        weight = ops.dequantize_4bit(*arguments).double()
        if linear.lora is not None:
            weight = weight + linear.lora[1].double() @ linear.lora[0].double()
        return F.linear(x, weight, None if linear.bias is None else linear.bias.double())

    half = model.head_dim // 2

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos[:half] - b * sin[:half], b * cos[half:] + a * sin[half:]), dim=-1)

    h = model.embedding[token].double()
    for i, layer in enumerate(model.layers):
        x = norm(h, layer.attention_norm)
        query, key = apply(layer.query, x).view(1, model.heads, 1, -1), apply(layer.key, x).view(model.kv_heads, 1, -1)
        if layer.query_norm is not None:
            query = F.rms_norm(query, query.shape[-1:], layer.query_norm.double(), model.epsilon)
        if layer.key_norm is not None:
            key = F.rms_norm(key, key.shape[-1:], layer.key_norm.double(), model.epsilon)
        query = rotate(query)
        key = torch.cat((keys[i, :, :at].double(), rotate(key)), dim=1)
        value = torch.cat((values[i, :, :at].double(), apply(layer.value, x).view(model.kv_heads, 1, -1)), dim=1)
        mixed = F.scaled_dot_product_attention(
            query, key[None], value[None], scale=model.attention_scale, enable_gqa=True
        )
        h = h + apply(layer.output, mixed.flatten())
        x = norm(h, layer.mlp_norm)
        h = h + apply(layer.down, F.silu(apply(layer.gate, x)) * apply(layer.up, x))
    return model.head.double() @ norm(h, model.final_norm)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    "model",
    [
        {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16},
        {
            "hidden": 64,
            "intermediate": 96,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "nested": False,
            "block_size": 32,
            "bias": True,
        },
        {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "lora": True},
        {"hidden": 35, "intermediate": 57, "heads": 3, "kv_heads": 1, "head_dim": 10, "lora": True, "bias": True},
        {"hidden": 48, "intermediate": 100, "heads": 2, "kv_heads": 2, "head_dim": 82, "block_size": 256},
        {"hidden": 64, "intermediate": 96, "heads": 6, "kv_heads": 2, "head_dim": 22, "head_norms": True},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
@pytest.mark.parametrize("position", [0, 1, 37, 515])
def test_no_further_from_float64_than_the_reference(
    implementation: str, model: dict[str, int], position: int, threads: int
) -> None:
    built = build(**model)
    shape = (3, built.kv_heads, 520, built.head_dim)
    keys, values = torch.randn(2, *shape).bfloat16()
    keys[:, :, position:] = values[:, :, position:] = torch.nan  # what is behind must not be read
    angle = torch.rand(built.head_dim) * 6
    arguments = built, 17, angle.cos(), angle.sin()
    truth = exact(*arguments, keys, values, position)
    their_keys, their_values = keys.clone(), values.clone()
    theirs = by_reference(ops.decode_token, *arguments, their_keys, their_values, position)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = ops.decode_token(*arguments, keys, values, position)
        assert ops.executed_implementation() == implementation
        assert torch.equal(ours, ops.decode_token(*arguments, keys, values, position))  # whoever took which rows
    finally:
        torch.set_num_threads(before)
    assert_no_worse(ours, theirs, truth, slack=0.1)
    for mine, reference in ((keys, their_keys), (values, their_values)):
        torch.testing.assert_close(mine[:, :, position], reference[:, :, position], rtol=0.03, atol=0.06)
        mine[:, :, position] = reference[:, :, position]
        assert torch.equal(mine.view(torch.int16), reference.view(torch.int16))  # nothing else was written
