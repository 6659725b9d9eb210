// Panels (tiles.hpp says how they lie in memory) filled from the rows of a matrix, whichever way the columns
// of the product run: across the rows, as in x · Wᵀ, or along them, as in x · W.
//
// A matrix is something with row(index, begin, count, buffer): the values of that stretch of a row, somewhere
// in `buffer`, which has room for count + row_slack and may be written to.
#pragma once

#include "../simd/isa.hpp"
#include "blocks.hpp"
#include "dropout.hpp"
#include "tiles.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t rows_ahead = 16;        // that fill_along asks the memory for
constexpr int64_t strip = 256;            // values of a row that are expanded at a time
constexpr int64_t row_slack = 2 * chunk;  // a stretch may begin and end inside a chunk
constexpr int64_t row_room = strip + row_slack;

HALFBYTE_INLINE int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
HALFBYTE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A 4-bit weight, its values rounded to T.
template <class P, class T>
class QuantizedRows {
  public:
    using Value = T;
    using Source = Weight4bit;

    explicit QuantizedRows(const Weight4bit& weight)
        : weight_(weight), size_(weight.out_features * weight.in_features), table_(weight.codebook) {
        while (weight.block_size >> block_shift_ > 1) ++block_shift_;
    }

    HALFBYTE_INLINE T* row(int64_t index, int64_t begin, int64_t count, T* buffer) {
        const int64_t first = index * weight_.in_features + begin, end = first + count;
        const int64_t start = first / chunk * chunk;
        const uint8_t* packed = weight_.packed;  // hoisted: what is written could alias the members
        const int64_t block_size = weight_.block_size, whole = size_ / chunk * chunk;
        T* out = buffer;
        for (int64_t i = start; i < end;) {
            const int64_t block = i >> block_shift_;
            table_.scale(scale_of(block));
            for (const int64_t stop = least(end, (block + 1) * block_size); i < stop;
                 i += chunk, out += chunk) {
                if (i < whole) {
                    table_.expand32(packed + i / 2, out);
                } else {
                    uint8_t bytes[chunk / 2] = {};
                    memcpy(bytes, packed + i / 2, static_cast<size_t>(size_ - i + 1) / 2);
                    table_.expand32(bytes, out);
                }
            }
        }
        return buffer + (first - start);
    }

    // For whoever goes down the rows: neighbours lie pages apart, where the hardware does not look ahead.
    HALFBYTE_INLINE void prefetch(int64_t index, int64_t begin, int64_t) const {
        const int64_t first = index * weight_.in_features + begin, block = first >> block_shift_;
        if (first >= size_) return;
        __builtin_prefetch(weight_.packed + first / 2);
        if (weight_.absmax != nullptr) {
            __builtin_prefetch(weight_.absmax + block);
        } else {
            __builtin_prefetch(weight_.absmax_codes + block);
        }
    }

    HALFBYTE_INLINE float scale_of(int64_t block) const {
        if (weight_.absmax != nullptr) return weight_.absmax[block];
        return weight_.nested_codebook[weight_.absmax_codes[block]] * weight_.nested_absmax[block >> 8] +
               weight_.nested_offset;
    }

    const Weight4bit weight_;
    const int64_t size_;
    int block_shift_ = 0;
    typename P::template Table<T> table_;
};

// A dense matrix of `columns`, perhaps with some of its values dropped.
template <class T>
class DenseRows {
  public:
    using Value = T;
    using Source = DenseRows;

    DenseRows(const void* values, int64_t stride, int64_t columns, Dropout dropout)
        : values_(static_cast<const T*>(values)), stride_(stride), columns_(columns), dropout_(dropout) {}

    HALFBYTE_INLINE T* row(int64_t index, int64_t begin, int64_t count, T* buffer) const {
        memcpy(buffer, values_ + index * stride_ + begin, static_cast<size_t>(count) * sizeof(T));
        if (dropout_.threshold != 0) drop(buffer, index, begin, count, columns_, dropout_);
        return buffer;
    }
    HALFBYTE_INLINE void prefetch(int64_t index, int64_t begin, int64_t count) const {
        const T* const row = values_ + index * stride_;
        for (int64_t i = begin; i < begin + count; i += cache_line / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(row + i);
    }

  private:
    const T* values_;
    int64_t stride_, columns_;
    Dropout dropout_;
};

// Steps of a panel over `count` values of the sum, as it is laid out: the last ones may hold nothing.
template <class P>
HALFBYTE_INLINE int64_t padded_steps(int64_t count) {
    return round_up(count, lanes * P::depth) / P::depth;
}

// panel[k][c] = rows[first_column + c][begin + k]. Rows that there are not count as zeros.
template <class P, class S, class Matrix>
void fill_across(Matrix& matrix, int64_t begin, int64_t count, int64_t first_column, int64_t columns,
                 typename P::Value* panel) {
    using T = typename Matrix::Value;
    constexpr int64_t vector_values = lanes * P::depth;
    alignas(64) T buffer[lanes * row_room];
    for (int64_t c = 0; c < columns;
         c += S::columns, panel += padded_steps<P>(count) * S::columns * P::depth) {
        for (int v = 0; v < S::vectors; ++v) {
            for (int64_t k = 0; k < count; k += strip) {
                const int64_t length = least(strip, count - k);
                const T* rows[lanes];
                for (int lane = 0; lane < lanes; ++lane) {
                    const int64_t column = c + P::template column<S::vectors>(v, lane);
                    T* row = buffer + lane * row_room;
                    if (column < columns) {
                        matrix.prefetch(first_column + column, begin + k + strip, strip / 2);
                        matrix.prefetch(first_column + column, begin + k + strip + strip / 2, strip / 2);
                        row = matrix.row(first_column + column, begin + k, length, row);
                        if (length % P::depth != 0) row[length] = T{};
                    } else {
                        memset(static_cast<void*>(row), 0, static_cast<size_t>(length + 1) * sizeof(T));
                    }
                    rows[lane] = row;
                }
                for (int64_t i = 0; i < length; i += vector_values) {
                    typename P::Vector square[lanes];
                    for (int lane = 0; lane < lanes; ++lane) square[lane] = P::load(rows[lane] + i);
                    transpose(square);
                    typename P::Value* out = panel + (k + i) * S::columns + v * vector_values;
                    for (int step = 0; step < lanes; ++step)
                        memcpy(out + step * S::columns * P::depth, &square[step], sizeof square[step]);
                }
            }
        }
    }
}

// panel[k][c] = rows[begin + k][first_column + c]. Columns and rows that there are not count as zeros.
template <class P, class S, class Matrix>
void fill_along(Matrix& matrix, int64_t begin, int64_t count, int64_t first_column, int64_t columns,
                typename P::Value* panel) {
    using T = typename Matrix::Value;
    const int64_t tile_stride = padded_steps<P>(count) * S::columns * P::depth;
    alignas(64) T buffer[P::depth * row_room];
    for (int64_t k = 0; k < count; k += P::depth, panel += S::columns * P::depth) {
        for (int64_t c = 0; c < columns; c += strip) {
            const int64_t length = least(strip, columns - c), padded = round_up(length, S::columns);
            const T* rows[P::depth];
            for (int d = 0; d < P::depth; ++d) {
                T* row = buffer + d * row_room;
                int64_t real = 0;
                if (k + d < count) {
                    matrix.prefetch(begin + k + d + rows_ahead, first_column + c, length);
                    row = matrix.row(begin + k + d, first_column + c, length, row);
                    real = length;
                }
                if (real < padded)
                    memset(static_cast<void*>(row + real), 0, static_cast<size_t>(padded - real) * sizeof(T));
                rows[d] = row;
            }
            for (int64_t i = 0; i < length; i += S::columns) {
                P::template interleave<S::vectors>(rows, panel + (c + i) / S::columns * tile_stride);
                for (int d = 0; d < P::depth; ++d) rows[d] += S::columns;
            }
        }
    }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
