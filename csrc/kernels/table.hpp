// The kernels of one instruction set, as table.cpp gathers them.
#pragma once

#include "../kernels.hpp"

namespace halfbyte::HALFBYTE_ISA {

int64_t quantize_4bit(const Quantize4bit&, int threads);
void dequantize_4bit(const Dequantize4bit&, int threads);
int64_t quantize_8bit(const Quantize8bit&, int threads);
void dequantize_8bit(const Dequantize8bit&, int threads);
void cross_entropy(const CrossEntropy&, int threads);
void norm_forward(const NormForward&, int threads);
void norm_backward(const NormBackward&, int threads);
void rotary(const Rotary&, int threads);
void gated_forward(const GatedForward&, int threads);
void gated_backward(const GatedBackward&, int threads);
void adamw_step(const AdamWStep&, int threads);
void adamw_8bit_step(const AdamW8bitStep&, int threads);
void matmul_4bit(const Matmul4bit&, int threads);
void matmul_dense(const MatmulDense&, int threads);
void attention(const Attention&, int threads);
void attention_backward(const AttentionBackward&, int threads);
int64_t attention_workspace_bytes(const AttentionShape&);
int64_t attention_backward_workspace_bytes(const AttentionShape&, int threads);
void decode_token(const DecodeToken&, int threads);

extern const Kernels kernels;

}  // namespace halfbyte::HALFBYTE_ISA
