// What a kernel is, seen from outside: plain structures of pointers and sizes, and a table of functions that
// every instruction set fills in. Nothing here is inline and nothing comes from the standard library's
// templates: this header is compiled under every instruction set's flags, and one inline function emitted
// under AVX-512 and kept by the linker would crash an older machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.hpp"

namespace halfbyte {

// 16-bit floats, as bits. Types of their own, so that overloads can tell them apart.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A codebook made ready for the nearest-entry search. `thresholds[r]` is the float32 midpoint between the
// entries of rank r and r + 1 in ascending order; a value's rank is the number of thresholds below it, so
// an exact midpoint goes to the lower entry. `code[r]` is the entry of rank r.
struct Codebook16 {
    float thresholds[16];  // 15 used, the last is +infinity
    uint8_t code[16];
};
struct Codebook256 {
    float thresholds[256];  // 255 used, the last is +infinity; the codebook is ascending, so rank is code
};

// A dynamic 8-bit codebook made ready to find the nearest entry without a search: the leading bits of a
// value, from its exponent on, name a cell of values, and no cell has more than one threshold inside. Cells
// begin at 2^-22, with what is smaller in the first of them, and end with 1; those of negative values come
// second.
struct DynamicMap {
    static constexpr int mantissa_bits = 7;
    static constexpr int octaves = 22;
    static constexpr int cells = (octaves << mantissa_bits) + 1;  // of one sign; the last is 1 itself
    static constexpr int shift = 23 - mantissa_bits;
    static constexpr int first_cell = (127 - octaves) << mantissa_bits;  // leading bits of 2^-22

    float entries[256];
    float thresholds[256];     // as in Codebook256
    int32_t below[2 * cells];  // thresholds below all of a cell's values
    int32_t zero;              // the code of 0
};

// Blocks of `block_size` values (a multiple of 32) share one absmax; the last block may be short.
struct Quantize4bit {
    const void* values;  // n values of `dtype`
    DType dtype;
    int64_t n;
    int64_t block_size;
    const Codebook16* codebook;
    uint8_t* packed;  // (n + 1) / 2 bytes; value 2i in the high nibble; an odd n is padded with the value 0
    float* absmax;    // ceil(n / block_size)
};

struct Dequantize4bit {
    const uint8_t* packed;  // (n + 1) / 2 bytes
    const float* absmax;    // ceil(n / block_size)
    const float* codebook;  // 16
    int64_t n;
    int64_t block_size;
    void* values;  // n values of `dtype`
    DType dtype;
};

struct Quantize8bit {
    const float* values;  // n
    int64_t n;
    int64_t block_size;
    const Codebook256* codebook;
    uint8_t* codes;  // n
    float* absmax;   // ceil(n / block_size)
};

struct Dequantize8bit {
    const uint8_t* codes;   // n
    const float* absmax;    // ceil(n / block_size)
    const float* codebook;  // 256
    int64_t n;
    int64_t block_size;
    float* values;  // n
};

}  // namespace halfbyte

#include "block.hpp"
#include "decode.hpp"
#include "matmul_4bit.hpp"

namespace halfbyte {

// One row of the dispatch table. The quantizers return the first block that holds a NaN or an infinity
// (its absmax and codes are then unspecified), or -1.
struct Kernels {
    const char* name;
    int64_t (*quantize_4bit)(const Quantize4bit&, int threads);
    void (*dequantize_4bit)(const Dequantize4bit&, int threads);
    int64_t (*quantize_8bit)(const Quantize8bit&, int threads);
    void (*dequantize_8bit)(const Dequantize8bit&, int threads);
    void (*cross_entropy)(const CrossEntropy&, int threads);
    void (*norm_forward)(const NormForward&, int threads);
    void (*norm_backward)(const NormBackward&, int threads);
    void (*rotary)(const Rotary&, int threads);
    void (*gated_forward)(const GatedForward&, int threads);
    void (*gated_backward)(const GatedBackward&, int threads);
    void (*adamw_step)(const AdamWStep&, int threads);
    void (*adamw_8bit_step)(const AdamW8bitStep&, int threads);
    void (*matmul_4bit)(const Matmul4bit&, int threads);
    void (*matmul_dense)(const MatmulDense&, int threads);
    void (*attention)(const Attention&, int threads);
    void (*attention_backward)(const AttentionBackward&, int threads);
    int64_t (*attention_workspace_bytes)(const AttentionShape&);
    int64_t (*attention_backward_workspace_bytes)(const AttentionShape&, int threads);
    void (*decode_token)(const DecodeToken&, int threads);
};

}  // namespace halfbyte
