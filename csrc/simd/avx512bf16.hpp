// AVX-512 BF16: what avx512.hpp has, and products of bf16 pairs. Contract: isa.hpp; of Pairs:
// kernels/tiles.hpp.
#pragma once

#include "avx512.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

HALFBYTE_INLINE void transpose(__m512i* r) {
    F32 floats[16];
    for (int i = 0; i < 16; ++i) floats[i] = _mm512_castsi512_ps(r[i]);
    transpose(floats);
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(floats[i]);
}

// Table16<bf16> for weights that are about to be multiplied: `vcvtneps2bf16` makes denormals zero, as which
// `vdpbf16ps` would take them.
class PairTable {
  public:
    explicit PairTable(const float* codebook) : codebook_(_mm512_loadu_ps(codebook)) {}

    HALFBYTE_INLINE void scale(float absmax) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(codebook_, _mm512_set1_ps(absmax)));
        table_ = _mm512_castsi256_si512(reinterpret_cast<__m256i>(rounded));
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, bf16* out) const {
        const I32 bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const I32 low_code = _mm512_set1_epi32(0xf0000);
        // High nibble in the low word, low nibble in the high one: (bytes >> 4) | (bytes << 16 & low_code).
        const I32 index = _mm512_ternarylogic_epi32(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16),
                                                    low_code, 0xf8);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table_));
    }

  private:
    F32 codebook_;
    __m512i table_ = _mm512_setzero_si512();  // sixteen entries, and what no index reaches
};

// Two neighbouring values of the sum in each lane.
struct Pairs {
    template <class>
    using Table = PairTable;
    using Value = bf16;
    using Vector = __m512i;
    static constexpr int depth = 2;
    static constexpr int64_t depth_block = 1024;

    HALFBYTE_INLINE static Vector load(const bf16* p) { return _mm512_loadu_si512(p); }
    HALFBYTE_INLINE static Vector broadcast(const bf16* p) {
        Vector v;  // an instruction of its own: see avx512.hpp
        asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const uint16_t (*)[2]>(p)));
        return v;
    }
    HALFBYTE_INLINE static F32 multiply_add(Vector a, Vector b, F32 c) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }

    // Registers take turns, the first the even columns of thirty-two and the second the odd ones: that is how
    // two rows of bf16 interleave into pairs with two operations a register, and sums interleave into a row.
    // One register alone is in order.
    template <int vectors>
    HALFBYTE_INLINE static int column(int vector, int lane) {
        return vectors == 1 ? lane : vector / 2 * 32 + lane * 2 + vector % 2;
    }

    template <int vectors>
    HALFBYTE_INLINE static void interleave(const bf16* const* rows, bf16* out) {
        if constexpr (vectors == 1) {
            const auto words = [](const bf16* p) {
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
            };
            _mm512_storeu_si512(out, _mm512_or_si512(words(rows[0]), _mm512_slli_epi32(words(rows[1]), 16)));
            return;
        }
        const __m512i low_words = _mm512_set1_epi32(0xffff);
        for (int v = 0; v < vectors; v += 2) {
            const __m512i a = load(rows[0] + v * 16), b = load(rows[1] + v * 16);
            const __m512i even = _mm512_ternarylogic_epi32(a, _mm512_slli_epi32(b, 16), low_words, 0xe4);
            const __m512i odd = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, low_words, 0xe4);
            _mm512_storeu_si512(out + v * 32, even);
            _mm512_storeu_si512(out + v * 32 + 32, odd);
        }
    }

    template <int vectors>
    HALFBYTE_INLINE static void store_row(const F32* sums, bf16* y) {
        if constexpr (vectors == 1) return HALFBYTE_ISA::store(y, sums[0]);
        alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i interleaved = _mm512_load_si512(order);
        for (int v = 0; v < vectors; v += 2) {
            const __m512i rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sums[v + 1], sums[v]));
            _mm512_storeu_si512(y + v * 16, _mm512_permutexvar_epi16(interleaved, rounded));
        }
    }
    template <int vectors>
    HALFBYTE_INLINE static void store_row(const F32* sums, float* y) {
        if constexpr (vectors == 1) return HALFBYTE_ISA::store(y, sums[0]);
        const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second =
            _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        for (int v = 0; v < vectors; v += 2) {
            HALFBYTE_ISA::store(y + v * 16, _mm512_permutex2var_ps(sums[v], first, sums[v + 1]));
            HALFBYTE_ISA::store(y + v * 16 + 16, _mm512_permutex2var_ps(sums[v], second, sums[v + 1]));
        }
    }
};

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
