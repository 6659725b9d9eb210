// 4-bit codes to values: the block's sixteen possible values are computed once, rounded to the output's type,
// and looked up. That is bit for bit the float32 product rounded per value, at a fraction of the work.

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "blocks.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <class T>
void dequantize_blocks(void* context, int64_t begin, int64_t end) {
    const Dequantize4bit& call = *static_cast<const Dequantize4bit*>(context);
    Table16<T> table(call.codebook);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * call.block_size;
        const int64_t count = call.n - start < call.block_size ? call.n - start : call.block_size;
        const uint8_t* packed = call.packed + start / 2;
        T* values = static_cast<T*>(call.values) + start;

        table.scale(call.absmax[block]);
        const int64_t whole = count / chunk * chunk;
        for (int64_t i = 0; i < whole; i += chunk) table.expand32(packed + i / 2, values + i);
        if (whole < count) {
            uint8_t bytes[chunk / 2] = {};
            T expanded[chunk];
            memcpy(bytes, packed + whole / 2, static_cast<size_t>(count - whole + 1) / 2);
            table.expand32(bytes, expanded);
            memcpy(values + whole, expanded, static_cast<size_t>(count - whole) * sizeof(T));
        }
    }
}

}  // namespace

void dequantize_4bit(const Dequantize4bit& call, int threads) {
    void (*body)(void*, int64_t, int64_t) = dequantize_blocks<float>;
    if (call.dtype == DType::bf16) body = dequantize_blocks<bf16>;
    if (call.dtype == DType::f16) body = dequantize_blocks<f16>;
    parallel_for(blocks_of(call.n, call.block_size), blocks_per_grain(call.block_size), threads, body,
                 const_cast<Dequantize4bit*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
