// 8-bit codes to float32 values.

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "blocks.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

HALFBYTE_INLINE void decode32(const float* codebook, const uint8_t* codes, F32 absmax, float* values) {
    for (int64_t i = 0; i < chunk; i += lanes)
        store(values + i, multiply(lookup256(codebook, codes + i), absmax));
}

void dequantize_blocks(void* context, int64_t begin, int64_t end) {
    const Dequantize8bit& call = *static_cast<const Dequantize8bit*>(context);
    const float* codebook = call.codebook;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * call.block_size;
        const int64_t count = call.n - start < call.block_size ? call.n - start : call.block_size;
        const uint8_t* codes = call.codes + start;
        float* values = call.values + start;

        const F32 absmax = broadcast(call.absmax[block]);
        const int64_t whole = count / chunk * chunk;
        for (int64_t i = 0; i < whole; i += chunk) decode32(codebook, codes + i, absmax, values + i);
        if (whole < count) {
            uint8_t padded[chunk] = {};
            float decoded[chunk];
            memcpy(padded, codes + whole, static_cast<size_t>(count - whole));
            decode32(codebook, padded, absmax, decoded);
            memcpy(values + whole, decoded, static_cast<size_t>(count - whole) * sizeof(float));
        }
    }
}

}  // namespace

void dequantize_8bit(const Dequantize8bit& call, int threads) {
    parallel_for(blocks_of(call.n, call.block_size), blocks_per_grain(call.block_size), threads,
                 dequantize_blocks, const_cast<Dequantize8bit*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
