"""One token of one sequence through a whole Llama-family model in 4 bits: the step that decoding repeats.

It is an op in that it has a reference and a kernel for each instruction set, but not one that torch knows: torch's
dispatcher would unpack a thousand tensors each token, and nothing traces or differentiates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor

from halfbyte.ops import _dispatch
from halfbyte.ops.matmul_4bit import Nested


class DecodeLinear(NamedTuple):
    """`W x + bias + B (A x)`, all tensors contiguous."""

    packed: Tensor  # as in matmul_4bit
    absmax: Tensor
    nested: Nested | None
    codebook: Tensor
    block_size: int
    shape: tuple[int, int]  # (out, in)
    bias: Tensor | None  # (out,) float32
    lora: tuple[Tensor, Tensor] | None  # A (r, in), B (out, r) with the scaling in it; bfloat16, r a multiple of 16


class DecodeLayer(NamedTuple):
    """`h = x + output(attention(norm(x)))`, then `h + down(silu(gate(norm(h))) * up(norm(h)))`."""

    attention_norm: Tensor  # (hidden,) float32
    mlp_norm: Tensor  # (hidden,) float32
    query: DecodeLinear
    key: DecodeLinear
    value: DecodeLinear
    output: DecodeLinear
    gate: DecodeLinear
    up: DecodeLinear
    down: DecodeLinear
    query_norm: Tensor | None = None  # (head_dim,) float32: of each head before its rotation, as in Qwen3
    key_norm: Tensor | None = None  # likewise


@dataclass(frozen=True, eq=False)
class DecodeModel:
    """A model as `decode_token` reads it. It shares the tensors' memory: change them, and it changes."""

    layers: tuple[DecodeLayer, ...]
    final_norm: Tensor  # (hidden,) float32
    embedding: Tensor  # (vocabulary, hidden) bfloat16
    head: Tensor  # (vocabulary, hidden) bfloat16
    heads: int
    kv_heads: int  # divides heads
    head_dim: int  # even
    epsilon: float  # of the norms
    attention_scale: float  # of query · key


def decode_token(
    model: DecodeModel,
    token: int,
    cos: Tensor,  # (head_dim,) float32: the rotation at `position`
    sin: Tensor,  # (head_dim,) float32
    keys: Tensor,  # (layers, kv_heads, capacity, head_dim) bfloat16; the token's are written at `position`
    values: Tensor,  # likewise
    position: int,  # below capacity: how many tokens came before
) -> Tensor:  # (vocabulary,) float32
    """Logits of what follows `token`.

    The residual, scores and sums are float32; what is multiplied with a weight, and what is kept in the cache, is
    rounded to bfloat16, and weights are the values that `dequantize_4bit` gives in bfloat16.
    """
    return cast(Tensor, _dispatch.call("decode_token", "cpu", model, token, cos, sin, keys, values, position))
