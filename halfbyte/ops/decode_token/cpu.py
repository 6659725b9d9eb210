"""decode_token on the compiled kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from halfbyte import _C

if TYPE_CHECKING:
    from halfbyte.ops.decode_token import DecodeLinear, DecodeModel

# The addresses of a model's tensors, which it keeps alive, as the kernels read them.
_compiled: WeakKeyDictionary[DecodeModel, _C.DecodeModel] = WeakKeyDictionary()


def decode_token(
    model: DecodeModel, token: int, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int
) -> Tensor:
    compiled = _compiled.get(model)
    if compiled is None:
        compiled = _compiled[model] = _compile(model)
    logits = torch.empty(len(model.head), dtype=torch.float32)
    compiled.step(
        model.embedding[token].data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[2],
        position,
        logits.data_ptr(),
        torch.get_num_threads(),
    )
    return logits


def _compile(model: DecodeModel) -> _C.DecodeModel:
    compiled = _C.DecodeModel(
        model.head.shape[1],
        model.layers[0].gate.shape[0],
        model.heads,
        model.kv_heads,
        model.head_dim,
        len(model.head),
        model.epsilon,
        model.attention_scale,
        model.final_norm.data_ptr(),
        model.head.data_ptr(),
    )
    for layer in model.layers:
        norms = layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm
        compiled.add_layer(*(0 if norm is None else norm.data_ptr() for norm in norms))
        for linear in (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down):
            _add_linear(compiled, linear)
    return compiled


def _add_linear(compiled: _C.DecodeModel, linear: DecodeLinear) -> None:
    nested = linear.nested
    compiled.add_linear(
        linear.packed.data_ptr(),
        linear.absmax.data_ptr() if nested is None else 0,
        0 if nested is None else linear.absmax.data_ptr(),
        0 if nested is None else nested.absmax.data_ptr(),
        0 if nested is None else nested.codebook.data_ptr(),
        0.0 if nested is None else nested.offset,
        linear.codebook.data_ptr(),
        linear.block_size,
        *linear.shape,
        0 if linear.bias is None else linear.bias.data_ptr(),
        0 if linear.lora is None else linear.lora[0].data_ptr(),
        0 if linear.lora is None else linear.lora[1].data_ptr(),
        0 if linear.lora is None else len(linear.lora[0]),
    )
