// The mask of a dropout: a hash of the place of a value, keyed by the seed.
//
// Two neighbours in a row share one hash, the even one its low sixteen bits. Their number is row ·
// ceil(columns / 2) + column / 2, modulo 2^32, and the hash two rounds of a 32-bit mixer (multiply and shift,
// constants from Wellons' search for low bias), with half of the seed before each. Written plainly: compilers
// make it vectors.
#pragma once

#include "../simd/isa.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

HALFBYTE_INLINE uint32_t dropout_hash(uint32_t pair, uint32_t low_seed, uint32_t high_seed) {
    uint32_t h = pair * 0x9e3779b1u + low_seed;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    h = (h ^ h >> 16) + high_seed;
    h = (h ^ h >> 16) * 0x21f0aaadu;
    h = (h ^ h >> 15) * 0x735a2d97u;
    return h ^ h >> 15;
}

HALFBYTE_INLINE void keep_if(float& value, bool keep) { value = keep ? value : 0.0f; }
template <class T>
HALFBYTE_INLINE void keep_if(T& value, bool keep) {  // bf16 and f16
    value.bits = static_cast<uint16_t>(keep ? value.bits : 0);
}

// Zeroes those that are dropped among `count` values from (row, begin) of a matrix of `columns`; `begin` is
// even.
template <class T>
void drop(T* values, int64_t row, int64_t begin, int64_t count, int64_t columns, const Dropout& dropout) {
    const uint32_t low = static_cast<uint32_t>(dropout.seed),
                   high = static_cast<uint32_t>(dropout.seed >> 32);
    uint32_t pair = static_cast<uint32_t>(row * ((columns + 1) / 2) + begin / 2);
    if (dropout.threshold > 0xffff)
        memset(static_cast<void*>(values), 0, static_cast<size_t>(count) * sizeof(T));
    const uint16_t threshold = static_cast<uint16_t>(dropout.threshold);
    constexpr int64_t batch = 64;
    for (int64_t i = 0; i < count; i += 2 * batch, pair += batch) {
        uint32_t hashes[batch];
        for (uint32_t k = 0; k < batch; ++k) hashes[k] = dropout_hash(pair + k, low, high);
        uint16_t bits[2 * batch];  // of a little-endian machine: the even column's first
        memcpy(bits, hashes, sizeof bits);
        if (count - i >= 2 * batch) {
            for (int64_t k = 0; k < 2 * batch; ++k) keep_if(values[i + k], bits[k] >= threshold);
        } else {
            for (int64_t k = 0; k < count - i; ++k) keep_if(values[i + k], bits[k] >= threshold);
        }
    }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
