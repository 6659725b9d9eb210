// Values to 4-bit codes: per block, the absmax in one pass and the codes in a second over the same, now
// cached, values. The nearest entry is found by comparing x * (1 / absmax) with the midpoints between
// entries.

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "blocks.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

struct Job {
    const Quantize4bit& call;
    int64_t first_bad;
};

template <class T>
HALFBYTE_INLINE void encode32(const T* values, F32 scale, const Nearest16& nearest, uint8_t* packed) {
    I32 ranks[chunk / lanes];
    for (int i = 0; i < chunk / lanes; ++i)
        ranks[i] = nearest.rank(multiply(load(values + i * lanes), scale));
    nearest.pack32(ranks, packed);
}

template <class T>
void quantize_blocks(void* context, int64_t begin, int64_t end) {
    Job& job = *static_cast<Job*>(context);
    const Quantize4bit& call = job.call;
    const Nearest16 nearest(*call.codebook);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * call.block_size;
        const int64_t count = call.n - start < call.block_size ? call.n - start : call.block_size;
        const T* values = static_cast<const T*>(call.values) + start;
        uint8_t* packed = call.packed + start / 2;

        const int32_t bits = absmax_bits(values, count);
        if (bits >= infinity_bits) return report_block(&job.first_bad, block);
        const float absmax = float_from_bits(bits);
        call.absmax[block] = absmax;

        const F32 scale = broadcast(reciprocal(absmax));
        const int64_t whole = count / chunk * chunk;
        for (int64_t i = 0; i < whole; i += chunk) encode32(values + i, scale, nearest, packed + i / 2);
        if (whole < count) {
            T padded[chunk] = {};
            uint8_t bytes[chunk / 2];
            memcpy(padded, values + whole, static_cast<size_t>(count - whole) * sizeof(T));
            encode32(padded, scale, nearest, bytes);
            memcpy(packed + whole / 2, bytes, static_cast<size_t>(count - whole + 1) / 2);
        }
    }
}

}  // namespace

int64_t quantize_4bit(const Quantize4bit& call, int threads) {
    Job job = {call, -1};
    void (*body)(void*, int64_t, int64_t) = quantize_blocks<float>;
    if (call.dtype == DType::bf16) body = quantize_blocks<bf16>;
    if (call.dtype == DType::f16) body = quantize_blocks<f16>;
    parallel_for(blocks_of(call.n, call.block_size), blocks_per_grain(call.block_size), threads, body, &job);
    return job.first_bad;
}

}  // namespace halfbyte::HALFBYTE_ISA
