// AVX-512 F, BW, DQ, VL (and F16C). Contract: isa.hpp.
#pragma once

#include <immintrin.h>

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int lanes = 16;
using F32 = __m512;
using I32 = __m512i;

HALFBYTE_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
HALFBYTE_INLINE F32 load(const bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
HALFBYTE_INLINE F32 load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HALFBYTE_INLINE void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
HALFBYTE_INLINE F32 broadcast(float x) { return _mm512_set1_ps(x); }
HALFBYTE_INLINE F32 multiply(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
HALFBYTE_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
HALFBYTE_INLINE F32 sqrt(F32 v) { return _mm512_sqrt_ps(v); }
HALFBYTE_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
HALFBYTE_INLINE float reduce_add(F32 v) { return _mm512_reduce_add_ps(v); }
HALFBYTE_INLINE float reduce_max(F32 v) { return _mm512_reduce_max_ps(v); }

HALFBYTE_INLINE I32 zero_bits() { return _mm512_setzero_si512(); }
HALFBYTE_INLINE I32 magnitude_bits(F32 v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}
HALFBYTE_INLINE I32 max(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
HALFBYTE_INLINE int32_t reduce_max(I32 v) { return _mm512_reduce_max_epi32(v); }

class Nearest16 {
  public:
    // Binary search in four steps. Before the step of size s the rank so far is a multiple of 2s, and the
    // threshold to compare with is number rank + s - 1: each step has a register holding that at lane `rank`.
    explicit Nearest16(const Codebook16& book)
        : step8_(_mm512_set1_ps(book.thresholds[7])),
          order_(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code)))) {
        const F32 t = _mm512_loadu_ps(book.thresholds);
        const I32 lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        step4_ = _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(3)), t);
        step2_ = _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(1)), t);
        step1_ = t;
    }

    HALFBYTE_INLINE I32 rank(F32 v) const {
        I32 r = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, step8_, _CMP_GT_OQ), 8);
        r = advance(r, v, step4_, 4);
        r = advance(r, v, step2_, 2);
        return advance(r, v, step1_, 1);
    }

    HALFBYTE_INLINE void pack32(const I32* ranks, uint8_t* out) const {
        const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(ranks[0])),
                                                      _mm512_cvtepi32_epi8(ranks[1]), 1);
        const __m256i codes = _mm256_shuffle_epi8(order_, bytes);
        // Each pair of bytes becomes 16 * first + second.
        const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtepi16_epi8(pairs));
    }

  private:
    HALFBYTE_INLINE static I32 advance(I32 rank, F32 v, F32 step, int size) {
        const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(rank, step), _CMP_GT_OQ);
        return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(size));
    }

    F32 step8_, step4_, step2_, step1_;
    __m256i order_;
};

// Round float32 to bf16 on the bits. vcvtneps2bf16 would flush denormals to zero.
HALFBYTE_INLINE __m256i round_to_bf16(F32 v) {
    const I32 bits = _mm512_castps_si512(v);
    const I32 odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I32 rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    // A NaN's bits could carry into its sign.
    const I32 safe =
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
}
HALFBYTE_INLINE __m256i round_to(F32 v, bf16) { return round_to_bf16(v); }
HALFBYTE_INLINE __m256i round_to(F32 v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
template <class T>
HALFBYTE_INLINE void store(T* p, F32 v) {  // bf16 and f16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to(v, T{}));
}

template <class T>
class Table16 {  // bf16 and f16
  public:
    explicit Table16(const float* codebook) : codebook_(_mm512_loadu_ps(codebook)) {}

    HALFBYTE_INLINE void scale(float absmax) {
        // Twice, so that the lookup can ignore the fifth bit of its index.
        table_ = _mm512_broadcast_i64x4(round_to(_mm512_mul_ps(codebook_, _mm512_set1_ps(absmax)), T{}));
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, T* out) const {
        const I32 bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const I32 index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table_));
    }

  private:
    F32 codebook_;
    __m512i table_ = _mm512_setzero_si512();
};

template <>
class Table16<float> {
  public:
    explicit Table16(const float* codebook) : codebook_(_mm512_loadu_ps(codebook)) {}

    HALFBYTE_INLINE void scale(float absmax) { table_ = _mm512_mul_ps(codebook_, _mm512_set1_ps(absmax)); }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, float* out) const {
        expand16(packed, out);
        expand16(packed + 8, out + 16);
    }

  private:
    HALFBYTE_INLINE void expand16(const uint8_t* packed, float* out) const {
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(index, table_));
    }

    F32 codebook_;
    F32 table_ = _mm512_setzero_ps();
};

HALFBYTE_INLINE I32 nearest256(const float* thresholds, F32 v) {
    I32 rank = _mm512_setzero_si512();
    for (int size = 128; size > 0; size /= 2) {
        const F32 t = _mm512_i32gather_ps(rank, thresholds + size - 1, 4);
        rank =
            _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(v, t, _CMP_GT_OQ), rank, _mm512_set1_epi32(size));
    }
    return rank;
}
HALFBYTE_INLINE void store_codes(uint8_t* p, I32 codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}
HALFBYTE_INLINE F32 lookup256(const float* table, const uint8_t* codes) {
    const I32 index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_i32gather_ps(index, table, 4);
}
HALFBYTE_INLINE F32 gather(const float* table, I32 index) { return _mm512_i32gather_ps(index, table, 4); }
HALFBYTE_INLINE I32 gather(const int32_t* table, I32 index) {
    return _mm512_i32gather_epi32(index, table, 4);
}

constexpr int registers = 32;

HALFBYTE_INLINE F32 zero() { return _mm512_setzero_ps(); }
HALFBYTE_INLINE F32 broadcast(const float* p) {
    F32 v = _mm512_set1_ps(*p);
    // Kept whole: the compiler would fold the load into each use, and loads are what a tile runs out of.
    asm("" : "+v"(v));
    return v;
}

HALFBYTE_INLINE void transpose(F32* r) {
    F32 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    const auto low = [](F32 x, F32 y) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto high = [](F32 x, F32 y) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    for (int i = 0; i < 16; i += 4) {
        b[i] = low(a[i], a[i + 2]);
        b[i + 1] = high(a[i], a[i + 2]);
        b[i + 2] = low(a[i + 1], a[i + 3]);
        b[i + 3] = high(a[i + 1], a[i + 3]);
    }
    // Quarter q of b[4g + c] now holds column 4q + c of rows 4g to 4g + 3.
    for (int c = 0; c < 4; ++c) {
        const F32 even = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88),
                  odd = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        const F32 even2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
        const F32 odd2 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        r[c] = _mm512_shuffle_f32x4(even, even2, 0x88);
        r[4 + c] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        r[8 + c] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        r[12 + c] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
