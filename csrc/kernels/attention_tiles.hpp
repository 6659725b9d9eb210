// What attention's forward and backward share.
//
// Queries lie in the lanes: a tile is 48 of them against up to 96 keys, and its scores are kept as
// [key][query], so that the softmax's maximum and sum run down registers and never across one. Every product
// of the two passes is then
//
//     C[row][lane] += sum over steps of A(row, step) * B[step][lane]
//
// with A's numbers broadcast from wherever they lie and B's rows read whole. A step is a `Word` of 32 bits:
// one float32, or with `vdpbf16ps` two bfloat16 that are neighbours along the sum. What must be laid out for
// that, once per tensor and not per tile:
//
//   rows    [row][word of head_dim]   A of q.k and dO.v; B's numbers where the sum runs over rows of one
//   float32 steps   [row / 2][head_dim]       two rows' bfloat16 side by side: B where the sum runs over rows
//   lanes   [word of head_dim][48]    B of q.k and dO.v
//
// Words are moved as float32 registers, which changes no bit of them.
#pragma once

#include "../simd/arithmetic.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t query_tile = 48;  // whole register tiles for 4, 8 and 16 lanes, and for 6, 8 and 12 rows
constexpr int64_t key_tile = 96;
constexpr int64_t strip = 8;  // keys whose scores are made at a time
constexpr int64_t max_head_dim = 256;
constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.69314718055994531f;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool many_registers = true;  // 32
#else
constexpr bool many_registers = false;  // 16
#endif

using Word = float;

struct FloatSteps {
    using Element = float;
    static constexpr int64_t per_word = 1;
    HALFBYTE_INLINE static F32 accumulate(F32 a, F32 b, F32 sum) { return multiply_add(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct PairSteps {
    using Element = bf16;
    static constexpr int64_t per_word = 2;
    HALFBYTE_INLINE static F32 accumulate(F32 a, F32 b, F32 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

HALFBYTE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
HALFBYTE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HALFBYTE_INLINE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the product
// ---------------------------------------------------------------------------------------------

struct Operand {  // A: its word for (row, step)
    const Word* words;
    int64_t row_stride, step_stride;
};

// Below, `R` rows times `N` registers of C stay in registers; 6 x 4 of 32 registers, 6 x 2 of 16.
template <class Steps, int R, int N>
HALFBYTE_INLINE void multiply_tile(const Operand& a, const Word* b, int64_t b_stride, int64_t steps,
                                   F32 (&c)[R][N]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) c[r][n] = broadcast(0.0f);
    const Word* words = a.words;
    for (int64_t step = 0; step < steps; ++step) {
        F32 right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) right[n] = load(b + n * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const F32 left = broadcast(words[r * a.row_stride]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) c[r][n] = Steps::accumulate(left, right[n], c[r][n]);
        }
        words += a.step_stride;
        b += b_stride;
    }
}

template <class Steps, int R, int N>
void add_columns(const Operand& a, const Word* b, int64_t b_stride, int64_t steps, float* c, int64_t c_stride,
                 int64_t first, int64_t last) {
    for (int64_t row = first / R * R; row < last; row += R) {
        F32 sums[R][N];
        multiply_tile<Steps, R, N>({a.words + row * a.row_stride, a.row_stride, a.step_stride}, b, b_stride,
                                   steps, sums);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                float* at = c + (row + r) * c_stride + n * lanes;
                store(at, load(at) + sums[r][n]);
            }
    }
}

// C[first..last) += A B over `columns`. Rows before and after, to a multiple of the register tile's height (a
// divisor of both tile sizes), are touched too: what they add must be harmless.
template <class Steps>
void add_product(const Operand& a, const Word* b, int64_t b_stride, int64_t steps, float* c, int64_t c_stride,
                 int64_t first, int64_t last, int64_t columns) {
    constexpr int64_t widest = many_registers ? 4 : 2;
    const int64_t registers = columns / lanes, blocks = (registers + widest - 1) / widest;
    for (int64_t block = 0, at = 0; block < blocks; ++block) {
        const int64_t width = (registers - at + blocks - block - 1) / (blocks - block);
        const Word* right = b + at * lanes;
        float* out = c + at * lanes;
        at += width;
        if constexpr (many_registers) {
            if (width == 4) {
                add_columns<Steps, 6, 4>(a, right, b_stride, steps, out, c_stride, first, last);
                continue;
            }
            if (width == 3) {
                add_columns<Steps, 8, 3>(a, right, b_stride, steps, out, c_stride, first, last);
                continue;
            }
        }
        if (width == 2)
            add_columns<Steps, many_registers ? 12 : 6, 2>(a, right, b_stride, steps, out, c_stride, first,
                                                           last);
        else
            add_columns<Steps, 12, 1>(a, right, b_stride, steps, out, c_stride, first, last);
    }
}

// out[8 keys][48 queries] = factor rows . lanes. Not inlined: constants of the caller's loops would push sums
// out of registers.
template <class Steps>
__attribute__((noinline)) void multiply_strip(const Word* rows, const Word* columns, int64_t words,
                                              float factor, float* out) {
    constexpr int R = many_registers ? 8 : 4, N = 3;
    const F32 by = broadcast(factor);
    for (int64_t column = 0; column < query_tile; column += N * lanes)
        for (int64_t row = 0; row < strip; row += R) {
            F32 sums[R][N];
            multiply_tile<Steps, R, N>({rows + row * words, words, 1}, columns + column, query_tile, words,
                                       sums);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n)
                    store(out + (row + r) * query_tile + column + n * lanes, sums[r][n] * by);
        }
}

// ---- laying out
// ----------------------------------------------------------------------------------------------

HALFBYTE_INLINE void convert_row(const float* from, int64_t count, float* to) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}
HALFBYTE_INLINE void convert_row(const bf16* from, int64_t count, bf16* to) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(bf16));
}
template <class T>
HALFBYTE_INLINE void convert_row(const T* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
    if (i < count) {
        T padded[lanes] = {};
        float values[lanes];
        memcpy(padded, from + i, static_cast<size_t>(count - i) * sizeof(T));
        store(values, load(padded));
        memcpy(to + i, values, static_cast<size_t>(count - i) * sizeof(float));
    }
}

// `count` rows of head_dim, then zeros to `padded` rows of `width` elements.
template <class Steps, class T>
void lay_rows(const T* from, int64_t row_stride, int64_t head_dim, int64_t count, int64_t padded,
              int64_t width, Word* to) {
    using Element = typename Steps::Element;
    Element* row = reinterpret_cast<Element*>(to);
    for (int64_t r = 0; r < count; ++r, row += width) {
        convert_row(from + r * row_stride, head_dim, row);
        memset(row + head_dim, 0, static_cast<size_t>(width - head_dim) * sizeof(Element));
    }
    memset(row, 0, static_cast<size_t>((padded - count) * width) * sizeof(Element));
}

// rows -> steps; for one float32 to a word the rows are the steps.
template <class Steps>
HALFBYTE_INLINE const Word* lay_steps(const Word* rows, int64_t count, int64_t width, Word* to) {
    if constexpr (Steps::per_word == 1) {
        (void)count, (void)width, (void)to;
        return rows;
    } else {
#if defined(__AVX512BF16__)
        const bf16* row = reinterpret_cast<const bf16*>(rows);
        Word* step = to;
        for (int64_t r = 0; r < count; r += 2, row += 2 * width, step += width)
            for (int64_t i = 0; i < width; i += 16) {
                const auto* even = reinterpret_cast<const __m256i*>(row + i);
                const auto* odd = reinterpret_cast<const __m256i*>(row + width + i);
                const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even));
                const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16);
                _mm512_storeu_si512(step + i, _mm512_or_si512(low, high));
            }
#endif
        return to;
    }
}

// 48 rows of `words` -> lanes
HALFBYTE_INLINE void lay_lanes(const Word* rows, int64_t words, Word* to) {
#if defined(__AVX512F__)
    if (words % 16 == 0) {
        for (int64_t column = 0; column < query_tile; column += 16)
            for (int64_t word = 0; word < words; word += 16) {
                __m512 r[16], t[16];
                const Word* from = rows + column * words + word;
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * words);
            // Four rounds: neighbours, pairs, then quarters of the registers.
#pragma GCC unroll 8
                for (int i = 0; i < 16; i += 2) {
                    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
                    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
                }
#pragma GCC unroll 4
                for (int i = 0; i < 16; i += 4) {
                    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
                    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
                    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
                    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
                    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
                    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
                    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
                }
                Word* out = to + word * query_tile + column;
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    _mm512_storeu_ps(out + i * query_tile, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
                    _mm512_storeu_ps(out + (i + 4) * query_tile,
                                     _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
                    _mm512_storeu_ps(out + (i + 8) * query_tile, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
                    _mm512_storeu_ps(out + (i + 12) * query_tile,
                                     _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
                }
            }
        return;
    }
#endif
    for (int64_t query = 0; query < query_tile; ++query)
        for (int64_t word = 0; word < words; ++word)
            to[word * query_tile + query] = rows[query * words + word];
}

// Two keys' registers of weights, as the steps of a sum over keys: words (key / per_word, query).
HALFBYTE_INLINE void store_steps(FloatSteps, Word* to, int64_t key, int64_t query, F32 first, F32 second) {
    store(to + key * query_tile + query, first);
    store(to + (key + 1) * query_tile + query, second);
}
// One key's register, as the steps of a sum over queries: words (key, query / per_word).
HALFBYTE_INLINE void store_row(FloatSteps, Word* to, int64_t key, int64_t query, F32 v) {
    store(to + key * query_tile + query, v);
}
#if defined(__AVX512BF16__)
HALFBYTE_INLINE void store_steps(PairSteps, Word* to, int64_t key, int64_t query, F32 first, F32 second) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to + (key >> 1) * query_tile + query, _mm512_permutexvar_epi16(interleave, halves));
}
HALFBYTE_INLINE void store_row(PairSteps, Word* to, int64_t key, int64_t query, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + key * (query_tile / 2) + query / 2),
                        (__m256i)_mm512_cvtneps_pbh(v));
}
#endif

// ---- who sees what
// -------------------------------------------------------------------------------------------

// The keys each query of a tile sees, [from, to]; lanes past the last query repeat it.
struct Sight {
    int32_t from[query_tile], to[query_tile];
    int64_t first_from, last_from, first_to, last_to;  // least and greatest of each
    int64_t count;                                     // queries that exist

    HALFBYTE_INLINE bool is_whole(int64_t begin, int64_t end) const {  // every query sees all of [begin, end)
        return last_from <= begin && end - 1 <= first_to;
    }
};

HALFBYTE_INLINE void look(const Attention& call, int64_t batch, int64_t first, Sight* sight) {
    const AttentionShape& s = call.shape;
    const int32_t* starts = call.segment_start ? call.segment_start + batch * s.queries : nullptr;
    sight->count = least(query_tile, s.queries - first);
    sight->first_from = s.keys;
    sight->last_from = 0;
    for (int64_t lane = 0; lane < query_tile; ++lane) {
        const int64_t query = first + least(lane, sight->count - 1), to = query + s.keys - s.queries;
        int64_t from = starts ? greatest(starts[query], 0) : 0;
        if (call.window > 0) from = greatest(from, to - call.window + 1);
        from = least(from, to);
        sight->from[lane] = static_cast<int32_t>(from);
        sight->to[lane] = static_cast<int32_t>(to);
        sight->first_from = least(sight->first_from, from);
        sight->last_from = greatest(sight->last_from, from);
    }
    sight->first_to = sight->to[0];
    sight->last_to = sight->to[query_tile - 1];
}

// tanh in terms of exp2; the argument is 2 log2(e) y. Its absolute error, 1e-7, is what a score is off by,
// times the cap.
HALFBYTE_INLINE F32 tanh_of(F32 x) {
    const F32 one = broadcast(1.0f);
    const F32 bounded = broadcast(0.0f) - max(broadcast(0.0f) - x, broadcast(-60.0f));
    return one - broadcast(2.0f) / (exp2(bounded) + one);
}

// What q.k is multiplied by: for scores in units of ln 2, and under a cap for the argument of tanh_of.
HALFBYTE_INLINE float score_factor(const Attention& call) {
    return call.scale * (call.softcap > 0 ? 2 * log2_e / call.softcap : log2_e);
}

// Caps and hides, in place, a strip's scores [key][query].
HALFBYTE_INLINE void finish_scores(const Attention& call, const Sight& sight, int64_t key, float* scores) {
    const bool whole = sight.is_whole(key, key + strip), capped = call.softcap > 0;
    if (whole && !capped) return;
    const F32 cap = broadcast(call.softcap * log2_e);
    for (int64_t k = 0; k < strip; ++k, scores += query_tile)
        for (int64_t lane = 0; lane < query_tile; lane += lanes) {
            F32 s = load(scores + lane);
            if (capped) s = tanh_of(s) * cap;
            if (!whole) s = hide(s, sight.from + lane, sight.to + lane, static_cast<int32_t>(key + k));
            store(scores + lane, s);
        }
}

template <class T>
HALFBYTE_INLINE const T* rows_of(const AttentionRows& rows, int64_t batch, int64_t head) {
    return static_cast<const T*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
}

// A row of float32 times a factor, to `T`.
template <class T>
HALFBYTE_INLINE void write_row(const float* from, float factor, int64_t count, T* to) {
    const F32 by = broadcast(factor);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(to + i, load(from + i) * by);
    if (i < count) {
        T values[lanes];
        store(values, load(from + i) * by);
        memcpy(to + i, values, static_cast<size_t>(count - i) * sizeof(T));
    }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
