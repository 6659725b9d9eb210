// Functions of a register, written once for every instruction set on the names of isa.hpp and on the
// operators that compilers give their vector types.
//
//   exp(F32)            relative error below 2e-7; 0 below -87.3, infinite above 88.3, NaN stays NaN
//   sigmoid(F32)        1 / (1 + e^-x)
//   tanh(F32)           absolute error below 2e-7
//   erf(F32)            absolute error below 5e-7
//   load_first(T*, n)   the first n values, the other lanes zero; touches no memory behind them
//   store_first(T*, n, F32)
#pragma once

#include "isa.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

typedef int32_t Bits
    __attribute__((vector_size(4 * lanes)));  // I32 with operators on 32-bit lanes, on any compiler

// e^x = 2^n * e^r with n the nearest integer to x / ln 2 and |r| <= ln 2 / 2, where six terms of the series
// suffice. ln 2 comes in two parts, the first with so few bits that n times it is exact.
HALFBYTE_INLINE F32 exp(F32 x) {
    const F32 round = broadcast(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
    const F32 shifted = multiply_add(x, broadcast(1.44269504f), round);
    const F32 n = shifted - round;
    F32 r = multiply_add(n, broadcast(-0x1.62e4p-1f), x);
    r = multiply_add(n, broadcast(-0x1.7f7d1cp-20f), r);
    F32 p = multiply_add(broadcast(1.0f / 720), r, broadcast(1.0f / 120));
    p = multiply_add(p, r, broadcast(1.0f / 24));
    p = multiply_add(p, r, broadcast(1.0f / 6));
    p = multiply_add(p, r, broadcast(0.5f));
    p = multiply_add(p, r, broadcast(1.0f));
    p = multiply_add(p, r, broadcast(1.0f));
    const F32 power = (F32)(((Bits)shifted + 127) << 23);
    const F32 zero = broadcast(0.0f), infinity = broadcast(__builtin_inff());
    const F32 bounded = x > broadcast(88.3f) ? infinity : p * power;
    return x < broadcast(-87.3f) ? zero : bounded;
}

HALFBYTE_INLINE F32 sigmoid(F32 x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(-x)); }
HALFBYTE_INLINE F32 tanh(F32 x) { return multiply_add(broadcast(2.0f), sigmoid(x + x), broadcast(-1.0f)); }

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
HALFBYTE_INLINE F32 erf(F32 x) {
    const F32 magnitude = max(x, -x), one = broadcast(1.0f);
    const F32 t = one / multiply_add(broadcast(0.3275911f), magnitude, one);
    F32 p = multiply_add(broadcast(1.061405429f), t, broadcast(-1.453152027f));
    p = multiply_add(p, t, broadcast(1.421413741f));
    p = multiply_add(p, t, broadcast(-0.284496736f));
    p = multiply_add(p, t, broadcast(0.254829592f));
    const F32 y = one - p * t * exp(-magnitude * magnitude);
    return x < broadcast(0.0f) ? -y : y;
}

template <class T>
HALFBYTE_INLINE F32 load_first(const T* p, int64_t n) {
    T padded[lanes] = {};
    memcpy(padded, p, static_cast<size_t>(n) * sizeof(T));
    return load(padded);
}

template <class T>
HALFBYTE_INLINE void store_first(T* p, int64_t n, F32 v) {
    T padded[lanes];
    store(padded, v);
    memcpy(p, padded, static_cast<size_t>(n) * sizeof(T));
}

// body(i, access) for every register of a row of n values, from value i. `access` gets and puts registers;
// the last may hold fewer values and is then padded with zeros.
#define HALFBYTE_LAMBDA __attribute__((always_inline))
struct Whole {
    template <class T>
    HALFBYTE_INLINE F32 get(const T* p) const {
        return load(p);
    }
    template <class T>
    HALFBYTE_INLINE void put(T* p, F32 v) const {
        store(p, v);
    }
    HALFBYTE_INLINE F32 only(F32 v) const { return v; }
};
struct Part {
    int64_t n;

    // The padding set back to zero, where arithmetic has made something else of it.
    HALFBYTE_INLINE F32 only(F32 v) const {
        float values[lanes];
        store(values, v);
        return load_first(values, n);
    }

    template <class T>
    HALFBYTE_INLINE F32 get(const T* p) const {
        return load_first(p, n);
    }
    template <class T>
    HALFBYTE_INLINE void put(T* p, F32 v) const {
        store_first(p, n, v);
    }
};

template <class Body>
HALFBYTE_INLINE void for_registers(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) body(i, Whole{});
    if (i < n) body(i, Part{n - i});
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
