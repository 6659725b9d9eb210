"""Modules and autograd over ops."""

from halfbyte.nn.attention import attention
from halfbyte.nn.dora import row_norms, row_squares
from halfbyte.nn.embedding4bit import Embedding4bit
from halfbyte.nn.experts4bit import Experts4bit
from halfbyte.nn.gated import gated, gated_halves
from halfbyte.nn.linear4bit import Linear4bit, frozen_linear
from halfbyte.nn.lora import lora_linear, lora_linears
from halfbyte.nn.loss import (
    LogitTransform,
    count_supervised,
    linear_cross_entropy,
    logit_transform,
    supervised_loss,
)
from halfbyte.nn.norm import layer_norm, rms_norm
from halfbyte.nn.packed import PackedWeights
from halfbyte.nn.rotary import rotate_queries_and_keys

__all__ = [
    "Embedding4bit",
    "Experts4bit",
    "Linear4bit",
    "LogitTransform",
    "PackedWeights",
    "attention",
    "count_supervised",
    "frozen_linear",
    "gated",
    "gated_halves",
    "layer_norm",
    "linear_cross_entropy",
    "logit_transform",
    "lora_linear",
    "lora_linears",
    "rms_norm",
    "rotate_queries_and_keys",
    "row_norms",
    "row_squares",
    "supervised_loss",
]
