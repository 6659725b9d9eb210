"""From a weight to 4 bits and back: the tensor, its double-quantized constants, its keys on disk."""

from halfbyte.quant.keys import QUANT_STATE_PREFIX, from_keys, to_keys
from halfbyte.quant.quantized import (
    DoubleQuantized,
    QuantizedTensor,
    codebook_8bit,
    matmul_sum,
    quantize_4bit,
    quantize_like,
    quantized_bytes,
    take_rows,
)

__all__ = [
    "QUANT_STATE_PREFIX",
    "DoubleQuantized",
    "QuantizedTensor",
    "codebook_8bit",
    "from_keys",
    "matmul_sum",
    "quantize_4bit",
    "quantize_like",
    "quantized_bytes",
    "take_rows",
    "to_keys",
]
