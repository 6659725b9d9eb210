// What attention needs of an instruction set beyond isa.hpp:
//
//   exp2(F32)               2^x to two units in the last place; 0 far below x = -126; x is at most 126. Half
//   the
//                           instructions of math.hpp's exp, and attention's scores come in units of ln 2
//   any_above(F32 a, F32 b) -> bool
//   hide(F32 s, const int32_t* from, const int32_t* to, int32_t key)
//                           `hidden` in the lanes where not from[lane] <= key <= to[lane]
#pragma once

#include "isa.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// The score of a key that a query does not see: far below any real one, and finite, so that differences are
// numbers.
constexpr float hidden = -3e38f;

#if defined(__AVX512F__)

HALFBYTE_INLINE bool any_above(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
HALFBYTE_INLINE F32 hide(F32 s, const int32_t* from, const int32_t* to, int32_t key) {
    const I32 at = _mm512_set1_epi32(key);
    const __mmask16 begun = _mm512_cmp_epi32_mask(_mm512_loadu_si512(from), at, _MM_CMPINT_LE);
    const __mmask16 seen = _mm512_mask_cmp_epi32_mask(begun, at, _mm512_loadu_si512(to), _MM_CMPINT_LE);
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(hidden), s);
}
HALFBYTE_INLINE F32 fraction(F32 x) { return _mm512_reduce_ps(x, 1); }  // above the integer below
HALFBYTE_INLINE F32 times_exp2_floor(F32 y, F32 x) { return _mm512_scalef_ps(y, x); }

#elif defined(__AVX2__)

HALFBYTE_INLINE bool any_above(F32 a, F32 b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
HALFBYTE_INLINE F32 hide(F32 s, const int32_t* from, const int32_t* to, int32_t key) {
    const I32 at = _mm256_set1_epi32(key);
    const I32 early = _mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), at);
    const I32 late = _mm256_cmpgt_epi32(at, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to)));
    return _mm256_blendv_ps(s, _mm256_set1_ps(hidden), _mm256_castsi256_ps(_mm256_or_si256(early, late)));
}
HALFBYTE_INLINE F32 clamped(F32 x) { return _mm256_max_ps(x, _mm256_set1_ps(-127.0f)); }
HALFBYTE_INLINE F32 fraction(F32 x) { return clamped(x) - _mm256_floor_ps(clamped(x)); }
HALFBYTE_INLINE F32 times_exp2_floor(F32 y, F32 x) {  // an exponent field of zero makes the factor zero
    const I32 exponent = _mm256_cvtps_epi32(_mm256_floor_ps(clamped(x)));
    const I32 bits = _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23);
    return y * _mm256_castsi256_ps(bits);
}

#else  // portable and neon: four lanes, in the compiler's own vectors

HALFBYTE_INLINE F32 choose(I32 mask, F32 a, F32 b) { return (F32)(((I32)a & mask) | ((I32)b & ~mask)); }
HALFBYTE_INLINE bool any_above(F32 a, F32 b) {
    const I32 above = (I32)(a > b);
    return (above[0] | above[1] | above[2] | above[3]) != 0;
}
HALFBYTE_INLINE F32 hide(F32 s, const int32_t* from, const int32_t* to, int32_t key) {
    I32 first, last;
    memcpy(&first, from, sizeof first);
    memcpy(&last, to, sizeof last);
    const I32 seen = (I32)(first <= key) & (I32)(last >= key);
    return choose(seen, s, broadcast(hidden));
}
HALFBYTE_INLINE I32 exponent_of(F32 x) {  // the integer below, at least -127
    const F32 least = broadcast(-127.0f);
    const F32 clamped = max(x, least);
    const I32 truncated = __builtin_convertvector(clamped, I32);
    return truncated +
           (I32)(__builtin_convertvector(truncated, F32) > clamped);  // a comparison that holds is -1
}
HALFBYTE_INLINE F32 fraction(F32 x) {
    return max(x, broadcast(-127.0f)) - __builtin_convertvector(exponent_of(x), F32);
}
HALFBYTE_INLINE F32 times_exp2_floor(F32 y, F32 x) {  // an exponent field of zero makes the factor zero
    return y * (F32)((exponent_of(x) + 127) << 23);
}

#endif

// 2^x = 2^floor(x) 2^f; the polynomial in f is 1 at 0 and has the least greatest relative error on [0,
// 1), 8.2e-8.
HALFBYTE_INLINE F32 exp2(F32 x) {
    const F32 f = fraction(x);
    F32 y = broadcast(0.0018671302823f);
    y = multiply_add(y, f, broadcast(0.0090170297771f));
    y = multiply_add(y, f, broadcast(0.0557999126613f));
    y = multiply_add(y, f, broadcast(0.2401644438505f));
    y = multiply_add(y, f, broadcast(0.6931512951850f));
    y = multiply_add(y, f, broadcast(1.0f));
    return times_exp2_floor(y, x);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
