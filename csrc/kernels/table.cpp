// One instruction set's row of the dispatch table. Its name is made here, from the same macro that chose the
// code beside it, so what a row says it is and what it runs cannot come apart.

#include "table.hpp"

#include "../simd/isa.hpp"

namespace halfbyte::HALFBYTE_ISA {

const Kernels kernels = {
    HALFBYTE_STRING(HALFBYTE_ISA),
    quantize_4bit,
    dequantize_4bit,
    quantize_8bit,
    dequantize_8bit,
    cross_entropy,
    norm_forward,
    norm_backward,
    rotary,
    gated_forward,
    gated_backward,
    adamw_step,
    adamw_8bit_step,
    matmul_4bit,
    matmul_dense,
    attention,
    attention_backward,
    attention_workspace_bytes,
    attention_backward_workspace_bytes,
    decode_token,
};

}  // namespace halfbyte::HALFBYTE_ISA
