// AVX2 and F16C. Contract: isa.hpp.
#pragma once

#include <immintrin.h>

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int lanes = 8;
using F32 = __m256;
using I32 = __m256i;

HALFBYTE_INLINE F32 load(const float* p) { return _mm256_loadu_ps(p); }
HALFBYTE_INLINE F32 load(const bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
HALFBYTE_INLINE F32 load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
HALFBYTE_INLINE F32 broadcast(float x) { return _mm256_set1_ps(x); }
HALFBYTE_INLINE F32 multiply(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
HALFBYTE_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
HALFBYTE_INLINE F32 sqrt(F32 v) { return _mm256_sqrt_ps(v); }
HALFBYTE_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
HALFBYTE_INLINE float reduce_add(F32 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
HALFBYTE_INLINE float reduce_max(F32 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

HALFBYTE_INLINE I32 zero_bits() { return _mm256_setzero_si256(); }
HALFBYTE_INLINE I32 magnitude_bits(F32 v) {
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
HALFBYTE_INLINE I32 max(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
HALFBYTE_INLINE int32_t reduce_max(I32 v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(m);
}

// A table of sixteen float32 over two registers; the index's fourth bit chooses between them.
struct Lookup16 {
    F32 low, high;

    HALFBYTE_INLINE F32 operator()(I32 index) const {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
};

class Nearest16 {
  public:
    // Binary search in four steps, as in avx512.hpp. The first comparison chooses the half of the thresholds
    // that the other three look into, so these index eight entries at a time.
    explicit Nearest16(const Codebook16& book)
        : middle_(_mm256_set1_ps(book.thresholds[7])),
          halves_{_mm256_loadu_ps(book.thresholds), _mm256_loadu_ps(book.thresholds + 8)},
          quarter_low_(_mm256_set1_ps(book.thresholds[3])),
          quarter_high_(_mm256_set1_ps(book.thresholds[11])),
          order_(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(book.code)))) {}

    HALFBYTE_INLINE I32 rank(F32 v) const {
        const F32 upper = _mm256_cmp_ps(v, middle_, _CMP_GT_OQ);
        I32 r = _mm256_and_si256(_mm256_castps_si256(upper), _mm256_set1_epi32(8));
        r = advance(r, v, _mm256_blendv_ps(quarter_low_, quarter_high_, upper), 4);
        r = advance(r, v, at(r, 1, upper), 2);
        return advance(r, v, at(r, 0, upper), 1);
    }

    HALFBYTE_INLINE void pack32(const I32* ranks, uint8_t* out) const {
        // Both packs work within 128-bit lanes: the bytes are a0-3 b0-3 c0-3 d0-3 | a4-7 b4-7 c4-7 d4-7.
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(ranks[0], ranks[1]),
                                                  _mm256_packs_epi32(ranks[2], ranks[3]));
        const __m256i codes = _mm256_shuffle_epi8(order_, bytes);
        // Each pair of bytes becomes 16 * first + second.
        const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
        const __m256i packed = _mm256_packus_epi16(pairs, pairs);
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(out),
            _mm_unpacklo_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
    }

  private:
    HALFBYTE_INLINE F32 at(I32 rank, int offset, F32 upper) const {
        const I32 index = _mm256_add_epi32(rank, _mm256_set1_epi32(offset));  // modulo 8, by the permutation
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(halves_.low, index),
                                _mm256_permutevar8x32_ps(halves_.high, index), upper);
    }
    HALFBYTE_INLINE static I32 advance(I32 rank, F32 v, F32 threshold, int size) {
        const I32 above = _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ));
        return _mm256_add_epi32(rank, _mm256_and_si256(above, _mm256_set1_epi32(size)));
    }

    F32 middle_;
    Lookup16 halves_;
    F32 quarter_low_, quarter_high_;
    __m256i order_;
};

HALFBYTE_INLINE I32 round_to(F32 v, bf16) {  // the 16 bits of the result in each 32-bit lane
    const I32 bits = _mm256_castps_si256(v);
    const I32 odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I32 rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    // A NaN's bits could carry into its sign.
    const F32 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const F32 safe = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                      _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
    return _mm256_srli_epi32(_mm256_castps_si256(safe), 16);
}
HALFBYTE_INLINE I32 round_to(F32 v, f16) {
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
template <class T>
HALFBYTE_INLINE void store(T* p, F32 v) {  // bf16 and f16
    const I32 bits = round_to(v, T{});
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}

template <class T>
class Table16 {  // bf16 and f16: byte shuffles, on the entries' low and high bytes apart
  public:
    explicit Table16(const float* codebook)
        : first_(_mm256_loadu_ps(codebook)), second_(_mm256_loadu_ps(codebook + 8)) {}

    HALFBYTE_INLINE void scale(float absmax) {
        const F32 by = _mm256_set1_ps(absmax);
        const I32 a = round_to(_mm256_mul_ps(first_, by), T{}), b = round_to(_mm256_mul_ps(second_, by), T{});
        const I32 entries = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
        const I32 low = _mm256_and_si256(entries, _mm256_set1_epi16(0xff));
        const I32 planes =
            _mm256_packus_epi16(low, _mm256_srli_epi16(entries, 8));  // l0-7 h0-7 | l8-15 h8-15
        low_bytes_ = _mm256_permute4x64_epi64(planes, _MM_SHUFFLE(2, 0, 2, 0));
        high_bytes_ = _mm256_permute4x64_epi64(planes, _MM_SHUFFLE(3, 1, 3, 1));
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, T* out) const {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
        const I32 wide = _mm256_cvtepu8_epi16(bytes);
        // Each 16-bit lane: the high nibble in its low byte, the low nibble in its high byte.
        const I32 codes = _mm256_and_si256(
            _mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)), _mm256_set1_epi8(0x0f));
        const I32 low = _mm256_shuffle_epi8(low_bytes_, codes),
                  high = _mm256_shuffle_epi8(high_bytes_, codes);
        const I32 a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }

  private:
    F32 first_, second_;
    I32 low_bytes_ = _mm256_setzero_si256(), high_bytes_ = _mm256_setzero_si256();
};

template <>
class Table16<float> {
  public:
    explicit Table16(const float* codebook)
        : first_(_mm256_loadu_ps(codebook)), second_(_mm256_loadu_ps(codebook + 8)) {}

    HALFBYTE_INLINE void scale(float absmax) {
        const F32 by = _mm256_set1_ps(absmax);
        table_ = {_mm256_mul_ps(first_, by), _mm256_mul_ps(second_, by)};
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, float* out) const {
        for (int i = 0; i < 4; ++i) {
            int32_t four;
            memcpy(&four, packed + 4 * i, 4);
            const I32 bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
            const I32 index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
            _mm256_storeu_ps(out + 8 * i, table_(index));
        }
    }

  private:
    F32 first_, second_;
    Lookup16 table_ = {_mm256_setzero_ps(), _mm256_setzero_ps()};
};

HALFBYTE_INLINE I32 nearest256(const float* thresholds, F32 v) {
    I32 rank = _mm256_setzero_si256();
    for (int size = 128; size > 0; size /= 2) {
        const F32 t = _mm256_i32gather_ps(thresholds + size - 1, rank, 4);
        const I32 above = _mm256_castps_si256(_mm256_cmp_ps(v, t, _CMP_GT_OQ));
        rank = _mm256_add_epi32(rank, _mm256_and_si256(above, _mm256_set1_epi32(size)));
    }
    return rank;
}
HALFBYTE_INLINE void store_codes(uint8_t* p, I32 codes) {
    const I32 words = _mm256_packs_epi32(codes, codes);
    const I32 bytes = _mm256_packus_epi16(words, words);
    const __m128i eight =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), eight);
}
HALFBYTE_INLINE F32 lookup256(const float* table, const uint8_t* codes) {
    const I32 index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_i32gather_ps(table, index, 4);
}
HALFBYTE_INLINE F32 gather(const float* table, I32 index) { return _mm256_i32gather_ps(table, index, 4); }
HALFBYTE_INLINE I32 gather(const int32_t* table, I32 index) {
    return _mm256_i32gather_epi32(table, index, 4);
}

constexpr int registers = 16;

HALFBYTE_INLINE F32 zero() { return _mm256_setzero_ps(); }
HALFBYTE_INLINE F32 broadcast(const float* p) { return _mm256_broadcast_ss(p); }

HALFBYTE_INLINE void transpose(F32* r) {
    F32 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        r[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
