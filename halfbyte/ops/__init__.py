"""Plain tensors in, plain tensors out. One folder an op, each with the oracle it is held to: see `_dispatch`."""

from halfbyte.ops._dispatch import (
    ENVIRONMENT_VARIABLE,
    Implementation,
    active_implementation,
    available_implementations,
    executed_implementation,
    forced_implementation,
)
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.dequantize_8bit import dequantize_8bit
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.quantize_8bit import quantize_8bit

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Implementation",
    "active_implementation",
    "available_implementations",
    "dequantize_4bit",
    "dequantize_8bit",
    "executed_implementation",
    "forced_implementation",
    "quantize_4bit",
    "quantize_8bit",
]
