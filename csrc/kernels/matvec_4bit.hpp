// A few rows times a 4-bit weight, as in decoding: the weight is read once from memory, and reading it is
// what takes the time. Each weight is expanded in registers and multiplied with every row of x at once.
#pragma once

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "panels.hpp"
#include "tiles.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t matvec_rows = 8;
constexpr int64_t codes_ahead = 1024;  // bytes; those of the rows that follow, which lie behind this one

HALFBYTE_INLINE bool is_matvec(const Matmul4bit& call) {
    return call.rows <= matvec_rows && !call.transposed && call.dropout.threshold == 0 &&
           call.terms->weight.in_features % chunk == 0;
}

template <class T>
HALFBYTE_INLINE T rounded(float value) {
    T values[lanes];
    store(values, broadcast(value));
    return values[0];
}

// left · row, `rank` long: too short for more than one lane of the sum at a time to matter.
template <class T>
HALFBYTE_INLINE float low_rank_sum(const T* left, const T* row, int64_t rank) {
    F32 sum = zero();
    int64_t i = 0;
    for (; i + lanes <= rank; i += lanes) sum = multiply_add(load(left + i), load(row + i), sum);
    if (i < rank) {
        T a[lanes] = {}, b[lanes] = {};
        memcpy(a, left + i, static_cast<size_t>(rank - i) * sizeof(T));
        memcpy(b, row + i, static_cast<size_t>(rank - i) * sizeof(T));
        sum = multiply_add(load(a), load(b), sum);
    }
    return reduce_add(sum);
}

// sums[m] = row · x[m]: two chunks at a time, of one block, with sums of their own, so that one product does
// not wait for the last. Rows are whole chunks.
template <class P, class T, int rows>
HALFBYTE_INLINE void matvec_row(QuantizedRows<P, T>& weight, int64_t row, const T* x, int64_t stride,
                                float* sums) {
    const int64_t first = row * weight.weight_.in_features, chunks = weight.weight_.in_features / chunk;
    const bool paired = weight.weight_.block_size >= 2 * chunk && chunks % 2 == 0;
    const uint8_t* const codes = weight.weight_.packed + first / 2;
    F32 halves[2][rows];
    HALFBYTE_UNROLL for (int m = 0; m < rows; ++m) halves[0][m] = halves[1][m] = zero();
    const auto add_chunk = [&](int64_t c, F32* chunk_sums) __attribute__((always_inline)) {
        alignas(64) T values[chunk];
        weight.table_.expand32(codes + c * (chunk / 2), values);
        HALFBYTE_UNROLL for (int64_t v = 0; v < chunk; v += lanes * P::depth) {
            const typename P::Vector w = P::load(values + v);
            HALFBYTE_UNROLL for (int m = 0; m < rows; ++m) chunk_sums[m] =
                P::multiply_add(w, P::load(x + m * stride + c * chunk + v), chunk_sums[m]);
        }
    };
    if (paired) {
        for (int64_t c = 0; c < chunks; c += 2) {
            __builtin_prefetch(codes + c * (chunk / 2) + codes_ahead);
            weight.table_.scale(weight.scale_of((first + c * chunk) >> weight.block_shift_));
            add_chunk(c, halves[0]);
            add_chunk(c + 1, halves[1]);
        }
    } else {
        for (int64_t c = 0; c < chunks; ++c) {
            weight.table_.scale(weight.scale_of((first + c * chunk) >> weight.block_shift_));
            add_chunk(c, halves[0]);
        }
    }
    for (int m = 0; m < rows; ++m)
        sums[m] = reduce_add(multiply_add(halves[0][m], broadcast(1.0f), halves[1][m]));
}

template <class P, class T, int rows>
void matvec_range(void* context, int64_t begin, int64_t end) {
    const Matmul4bit& call = *static_cast<const Matmul4bit*>(context);
    const Matmul4bitTerm& term = *call.terms;
    const T* const x = static_cast<const T*>(term.x);
    const T* const right = static_cast<const T*>(call.right);
    const T* const left = static_cast<const T*>(call.left);
    T* const y = static_cast<T*>(call.y);
    const int64_t out = term.weight.out_features, rank = call.rank;
    QuantizedRows<P, T> weight(term.weight);
    for (int64_t column = begin; column < end; ++column) {
        float sums[rows];
        matvec_row<P, T, rows>(weight, column, x, term.x_stride, sums);
        for (int m = 0; m < rows; ++m) {
            if (rank > 0) sums[m] += low_rank_sum(left + m * call.left_stride, right + column * rank, rank);
            y[m * out + column] = rounded<T>(sums[m]);
        }
    }
}

template <class P, class T>
HALFBYTE_INLINE void matvec_of_type(const Matmul4bit& call, int threads) {
    constexpr void (*bodies[matvec_rows])(void*, int64_t, int64_t) = {
        matvec_range<P, T, 1>, matvec_range<P, T, 2>, matvec_range<P, T, 3>, matvec_range<P, T, 4>,
        matvec_range<P, T, 5>, matvec_range<P, T, 6>, matvec_range<P, T, 7>, matvec_range<P, T, 8>};
    const int64_t columns_per_grain = 1 + values_per_grain / call.terms->weight.in_features;
    parallel_for(call.terms->weight.out_features, columns_per_grain, threads, bodies[call.rows - 1],
                 const_cast<Matmul4bit*>(&call));
}

HALFBYTE_INLINE void matvec_4bit(const Matmul4bit& call, int threads) {
    if (call.dtype == DType::f32) matvec_of_type<Singles, float>(call, threads);
    if (call.dtype == DType::bf16) matvec_of_type<Bf16Operand, bf16>(call, threads);
    if (call.dtype == DType::f16) matvec_of_type<Singles, f16>(call, threads);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
