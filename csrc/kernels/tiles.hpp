// The innermost product: a tile of sums that lives in registers while the sum's index runs.
//
// A tile is `tile_rows` rows of the left operand, read where they are, times `tile_vectors` registers of
// columns of a panel, which is laid out in the order of reading:
//
//   panel      [tile of columns][step][register][lane][depth]
//   step       `depth` neighbouring indices of the sum, all in one lane
//
// Six rows by four registers leave room for the four of the panel and a broadcast among thirty-two registers,
// and make 24 products of 10 loads. How values meet in a lane is an operand type: Singles here, Pairs in
// simd/avx512bf16.hpp. Both have
//
//   Table<T>                    Table16<T>, or what serves products as well
//   Value, Vector, depth        what panels hold, a register of it, values of the sum in a lane
//   depth_block                 how much of the sum a panel spans: it should fit the second-level cache
//   load, broadcast, multiply_add
//   column(register, lane)      which column of a tile that lane is
//   interleave(rows, out)       one step of a panel whose columns run along `depth` rows
//   store_row(sums, y)          sums of one row of a tile, rounded to the type of y, in the order of columns
#pragma once

#include "../simd/isa.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Before a loop of constant length over an array of registers. Unrolled at once, the array is registers;
// unrolled by the optimizer in its own time, it stays in memory and is written back at every step.
#define HALFBYTE_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t cache_line = 64;  // bytes

template <int tile_rows, int tile_vectors>
struct Shape {
    static constexpr int rows = tile_rows;
    static constexpr int vectors = tile_vectors;
    static constexpr int columns = vectors * lanes;
    static constexpr int sums = rows * columns;
};
using WideTile = Shape<6, registers == 32 ? 4 : 2>;
// For products of few columns on registers of sixteen lanes, where a wide tile would mostly hold padding.
using NarrowTile = Shape<8, 2>;
using NarrowestTile = Shape<12, 1>;
constexpr int most_tile_rows = 12;

// float32 values, one in a lane. Rows of other types are widened as they are read.
struct Singles {
    template <class T>
    using Table = Table16<T>;
    using Value = float;
    using Vector = F32;
    static constexpr int depth = 1;
    static constexpr int64_t depth_block = 512;

    template <class T>
    HALFBYTE_INLINE static F32 load(const T* p) {
        return HALFBYTE_ISA::load(p);
    }
    HALFBYTE_INLINE static F32 broadcast(const float* p) { return HALFBYTE_ISA::broadcast(p); }
    HALFBYTE_INLINE static F32 multiply_add(F32 a, F32 b, F32 c) {
        return HALFBYTE_ISA::multiply_add(a, b, c);
    }

    template <int>
    HALFBYTE_INLINE static int column(int vector, int lane) {
        return vector * lanes + lane;
    }

    template <int vectors, class T>
    HALFBYTE_INLINE static void interleave(const T* const* rows, float* out) {
        for (int v = 0; v < vectors; ++v) store(out + v * lanes, load(rows[0] + v * lanes));
    }
    template <int vectors, class T>
    HALFBYTE_INLINE static void store_row(const F32* sums, T* y) {
        for (int v = 0; v < vectors; ++v) store(y + v * lanes, sums[v]);
    }
};

#ifdef __AVX512BF16__
using Bf16Operand = Pairs;
#else
using Bf16Operand = Singles;
#endif

// sums += a · panel over `steps` steps, or = where the sums are `fresh`. Rows of `a` are `stride` values
// apart.
template <class P, class S, int rows>
void multiply_tile(const typename P::Value* a, int64_t stride, const typename P::Value* panel, int64_t steps,
                   float* sums, bool fresh) {
    F32 acc[rows][S::vectors];
    HALFBYTE_UNROLL for (int i = 0; i < rows; ++i) {
        HALFBYTE_UNROLL for (int v = 0; v < S::vectors; ++v) acc[i][v] = zero();
    }
    constexpr int64_t line_steps = cache_line / static_cast<int64_t>(P::depth * sizeof(typename P::Value));
    for (int64_t step = 0; step < steps;) {
        // What the next tile of rows will read.
        HALFBYTE_UNROLL for (int i = 0; i < rows; ++i) __builtin_prefetch(a + (rows + i) * stride);
        for (const int64_t stop = steps - step < line_steps ? steps : step + line_steps; step < stop;
             ++step) {
            typename P::Vector b[S::vectors];
            HALFBYTE_UNROLL for (int v = 0; v < S::vectors; ++v) b[v] = P::load(panel + v * lanes * P::depth);
            HALFBYTE_UNROLL for (int i = 0; i < rows; ++i) {
                const typename P::Vector left = P::broadcast(a + i * stride);
                HALFBYTE_UNROLL for (int v = 0; v < S::vectors; ++v) acc[i][v] =
                    P::multiply_add(left, b[v], acc[i][v]);
            }
            a += P::depth;
            panel += S::columns * P::depth;
        }
    }
    // What is there already is added last: a long sum is made of short ones, and so nearer to the exact one.
    if (!fresh) {
        HALFBYTE_UNROLL for (int i = 0; i < rows; ++i) {
            HALFBYTE_UNROLL for (int v = 0; v < S::vectors; ++v) acc[i][v] =
                acc[i][v] + load(sums + (i * S::vectors + v) * lanes);
        }
    }
    HALFBYTE_UNROLL for (int i = 0; i < rows; ++i) {
        HALFBYTE_UNROLL for (int v = 0; v < S::vectors; ++v)
            store(sums + (i * S::vectors + v) * lanes, acc[i][v]);
    }
}

template <class P>
using MultiplyTile = void (*)(const typename P::Value*, int64_t, const typename P::Value*, int64_t, float*,
                              bool);

// By the number of rows, less one.
template <class P, class S, int rows>
constexpr MultiplyTile<P> multiply_rows = multiply_tile < P,
                          S, rows <= S::rows ? rows : S::rows > ;
template <class P, class S>
constexpr MultiplyTile<P> multiply_tiles[most_tile_rows] = {
    multiply_rows<P, S, 1>, multiply_rows<P, S, 2>,  multiply_rows<P, S, 3>,  multiply_rows<P, S, 4>,
    multiply_rows<P, S, 5>, multiply_rows<P, S, 6>,  multiply_rows<P, S, 7>,  multiply_rows<P, S, 8>,
    multiply_rows<P, S, 9>, multiply_rows<P, S, 10>, multiply_rows<P, S, 11>, multiply_rows<P, S, 12>};

// One row of a tile, times `scale`, rounded to the type of `y`; `columns` of the tile are real.
template <class P, class S, class Y>
HALFBYTE_INLINE void store_row(const float* sums, float scale, int64_t columns, Y* y) {
    F32 row[S::vectors];
    HALFBYTE_UNROLL for (int v = 0; v < S::vectors; ++v) row[v] =
        multiply(load(sums + v * lanes), broadcast(scale));
    if (columns >= S::columns) {
        P::template store_row<S::vectors>(row, y);
    } else {
        Y whole[S::columns];
        P::template store_row<S::vectors>(row, whole);
        memcpy(y, whole, static_cast<size_t>(columns) * sizeof(Y));
    }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
