// float32 values to 8-bit codes of an ascending codebook of 256: a binary search among its 255 midpoints.

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "blocks.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

struct Job {
    const Quantize8bit& call;
    int64_t first_bad;
};

HALFBYTE_INLINE void encode32(const float* values, F32 scale, const float* thresholds, uint8_t* codes) {
    for (int64_t i = 0; i < chunk; i += lanes)
        store_codes(codes + i, nearest256(thresholds, multiply(load(values + i), scale)));
}

void quantize_blocks(void* context, int64_t begin, int64_t end) {
    Job& job = *static_cast<Job*>(context);
    const Quantize8bit& call = job.call;
    const float* thresholds = call.codebook->thresholds;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * call.block_size;
        const int64_t count = call.n - start < call.block_size ? call.n - start : call.block_size;
        const float* values = call.values + start;
        uint8_t* codes = call.codes + start;

        const int32_t bits = absmax_bits(values, count);
        if (bits >= infinity_bits) return report_block(&job.first_bad, block);
        const float absmax = float_from_bits(bits);
        call.absmax[block] = absmax;

        const F32 scale = broadcast(reciprocal(absmax));
        const int64_t whole = count / chunk * chunk;
        for (int64_t i = 0; i < whole; i += chunk) encode32(values + i, scale, thresholds, codes + i);
        if (whole < count) {
            float padded[chunk] = {};
            uint8_t bytes[chunk];
            memcpy(padded, values + whole, static_cast<size_t>(count - whole) * sizeof(float));
            encode32(padded, scale, thresholds, bytes);
            memcpy(codes + whole, bytes, static_cast<size_t>(count - whole));
        }
    }
}

}  // namespace

int64_t quantize_8bit(const Quantize8bit& call, int threads) {
    Job job = {call, -1};
    parallel_for(blocks_of(call.n, call.block_size), blocks_per_grain(call.block_size), threads,
                 quantize_blocks, &job);
    return job.first_bad;
}

}  // namespace halfbyte::HALFBYTE_ISA
