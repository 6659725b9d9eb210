"""Plain tensors in, plain tensors out. One folder an op, each with the oracle it is held to: see `_dispatch`."""

from halfbyte.ops._checks import FLOAT_DTYPES
from halfbyte.ops._dispatch import (
    ENVIRONMENT_VARIABLE,
    Implementation,
    active_implementation,
    available_implementations,
    executed_implementation,
    forced_implementation,
)
from halfbyte.ops._dropout import Dropout
from halfbyte.ops.adamw_8bit_step import adamw_8bit_step
from halfbyte.ops.adamw_step import adamw_step
from halfbyte.ops.attention import attention
from halfbyte.ops.attention_backward import attention_backward
from halfbyte.ops.decode_token import DecodeLayer, DecodeLinear, DecodeModel, decode_token
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.dequantize_8bit import dequantize_8bit
from halfbyte.ops.gated import ACTIVATIONS, gated, gated_backward
from halfbyte.ops.layer_norm import layer_norm, layer_norm_backward
from halfbyte.ops.linear_cross_entropy import linear_cross_entropy
from halfbyte.ops.matmul_4bit import Nested, matmul_4bit
from halfbyte.ops.matmul_4bit_sum import MOST_TERMS, Term, matmul_4bit_sum
from halfbyte.ops.matmul_dense import matmul_dense
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.quantize_8bit import quantize_8bit
from halfbyte.ops.rms_norm import rms_norm, rms_norm_backward
from halfbyte.ops.rotary import rotary

__all__ = [
    "ACTIVATIONS",
    "ENVIRONMENT_VARIABLE",
    "FLOAT_DTYPES",
    "MOST_TERMS",
    "DecodeLayer",
    "DecodeLinear",
    "DecodeModel",
    "Dropout",
    "Implementation",
    "Nested",
    "Term",
    "active_implementation",
    "adamw_8bit_step",
    "adamw_step",
    "attention",
    "attention_backward",
    "available_implementations",
    "decode_token",
    "dequantize_4bit",
    "dequantize_8bit",
    "executed_implementation",
    "forced_implementation",
    "gated",
    "gated_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear_cross_entropy",
    "matmul_4bit",
    "matmul_4bit_sum",
    "matmul_dense",
    "quantize_4bit",
    "quantize_8bit",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
]
