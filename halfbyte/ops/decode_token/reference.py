"""The oracle of decode_token: plain torch, rounding where the kernel does, to the dtype of the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.dequantize_8bit import dequantize_8bit

if TYPE_CHECKING:
    from halfbyte.ops.decode_token import DecodeLinear, DecodeModel


def decode_token(
    model: DecodeModel, token: int, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int
) -> Tensor:
    def linear(weights: DecodeLinear, x: Tensor) -> Tensor:
        return _linear(weights, x.to(keys.dtype).float())

    residual = model.embedding[token].float()
    for index, layer in enumerate(model.layers):
        x = _norm(residual, layer.attention_norm, model.epsilon)
        query, key = linear(layer.query, x).view(model.heads, -1), linear(layer.key, x).view(model.kv_heads, -1)
        if layer.query_norm is not None:
            query = _norm(query, layer.query_norm, model.epsilon)
        if layer.key_norm is not None:
            key = _norm(key, layer.key_norm, model.epsilon)
        query = _rotate(query, cos, sin) * model.attention_scale
        keys[index, :, position] = _rotate(key, cos, sin)
        value = linear(layer.value, x).view(model.kv_heads, 1, -1)
        values[index, :, position] = value[:, 0]
        group = query.view(model.kv_heads, -1, model.head_dim)
        weights = (group @ keys[index, :, : position + 1].float().mT).softmax(-1)
        seen = torch.cat((values[index, :, :position].float(), value), dim=1)
        residual = residual + linear(layer.output, (weights @ seen).flatten())
        x = _norm(residual, layer.mlp_norm, model.epsilon)
        residual = residual + linear(layer.down, F.silu(linear(layer.gate, x)) * linear(layer.up, x))
    return model.head.float() @ _norm(residual, model.final_norm, model.epsilon).to(keys.dtype).float()


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _linear(linear: DecodeLinear, x: Tensor) -> Tensor:
    absmax = linear.absmax
    if linear.nested is not None:
        absmax = dequantize_8bit(absmax, linear.nested.absmax, linear.nested.codebook, 256) + linear.nested.offset
    weight = dequantize_4bit(
        linear.packed, absmax, linear.codebook, linear.block_size, list(linear.shape), torch.bfloat16
    )
    y = weight.float() @ x
    if linear.lora is not None:
        lora_A, lora_B = linear.lora
        y = y + lora_B.float() @ (lora_A.float() @ x)
    return y if linear.bias is None else y + linear.bias
