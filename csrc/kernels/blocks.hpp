// What the blockwise quantizers share: the greatest magnitude of a block, and what to multiply by.
#pragma once

#include "../simd/isa.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Values are taken thirty-two at a time, the smallest block. What is left at the end of a tensor goes through
// a buffer of that size padded with zeros, so that kernels have no second, scalar body.
constexpr int64_t chunk = 32;

// Blocks below this many values are not worth waking another thread for.
constexpr int64_t values_per_grain = 32768;

template <class T>
HALFBYTE_INLINE I32 max_magnitude_bits(const T* values, I32 so_far) {
    for (int64_t i = 0; i < chunk; i += lanes) so_far = max(so_far, magnitude_bits(load(values + i)));
    return so_far;
}

// The greatest |value| of a block as float32 bits. Compared as integers these order as magnitudes do, with
// the infinities and NaN above every number: one comparison afterwards finds both.
template <class T>
HALFBYTE_INLINE int32_t absmax_bits(const T* values, int64_t count) {
    I32 bits = zero_bits();
    const int64_t whole = count / chunk * chunk;
    for (int64_t i = 0; i < whole; i += chunk) bits = max_magnitude_bits(values + i, bits);
    if (whole < count) {
        T padded[chunk] = {};
        memcpy(padded, values + whole, static_cast<size_t>(count - whole) * sizeof(T));
        bits = max_magnitude_bits(padded, bits);
    }
    return reduce_max(bits);
}

constexpr int32_t infinity_bits = 0x7f800000;

HALFBYTE_INLINE float float_from_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// 1 / absmax, but 1 / 1e-38 for smaller ones: below 2^-128 the reciprocal would be infinite, and zero times
// it NaN. The values of such a block come out nearer to zero than they were, by less than 1e-38.
HALFBYTE_INLINE float reciprocal(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

// Keeps the lowest of the failed blocks that several threads report.
HALFBYTE_INLINE void report_block(int64_t* first_bad, int64_t block) {
    int64_t seen = __atomic_load_n(first_bad, __ATOMIC_RELAXED);
    while ((seen < 0 || block < seen) &&
           !__atomic_compare_exchange_n(first_bad, &seen, block, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

HALFBYTE_INLINE int64_t blocks_of(int64_t n, int64_t block_size) { return (n + block_size - 1) / block_size; }

HALFBYTE_INLINE int64_t blocks_per_grain(int64_t block_size) {
    return block_size < values_per_grain ? values_per_grain / block_size : 1;
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
