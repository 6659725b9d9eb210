// y = scale · (Σ drop(x) · V + drop(left · right)), for matrices V that panels can be filled from.
//
// A task is a block of rows times a block of columns of y. It walks the sums in blocks; for each it lays out
// the part of V that it needs as a panel that stays in cache, and multiplies every tile of its rows by it. A
// weight that is expanded this way is never in memory as a whole. The low-rank term is so many more columns
// of the sum, added while a tile's sums are still in the first-level cache.
#pragma once

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "panels.hpp"
#include "tiles.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// The panel stays in the second-level cache; sums pass through it, once a block of the sum, which is seldom
// enough.
constexpr int64_t most_rows = 2064;
constexpr int64_t panel_columns = 128;

// Tasks are blocks of `rows` × `columns`, block row by block row. Those that are left when every thread has
// had as many are cut by rows, into a strip for each thread.
struct Grid {
    int64_t rows, columns;  // of a task
    int64_t column_tasks;
    int64_t whole, strips, strip_rows;  // tasks that are not cut; strips of each that is, and their rows
    int64_t tasks;
};

HALFBYTE_INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class S>
HALFBYTE_INLINE Grid make_grid(int64_t rows, int64_t columns, int threads) {
    // Panels are filled once a block of rows, so rows are cut last; four tasks a thread keep all of them
    // busy.
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    int64_t row_tasks = pieces(rows, most_rows), width = round_up(panel_columns, S::columns);
    if (row_tasks * pieces(columns, width) < wanted) width = round_up(width / 2, S::columns);
    const int64_t height = round_up(pieces(rows, row_tasks), S::rows), across = pieces(columns, width);
    const int64_t blocks = pieces(rows, height) * across, cut = blocks % threads;
    const int64_t strip_rows = round_up(pieces(height, threads), S::rows),
                  strips = pieces(height, strip_rows);
    return {height, width, across, blocks - cut, strips, strip_rows, blocks - cut + cut * strips};
}

template <class T, class Source>
struct Term {
    const T* x;
    int64_t x_stride;
    int64_t depth;
    Source source;  // what a task makes its matrix of
};

template <class T, class Y, class Matrix>
struct Product {
    const Term<T, typename Matrix::Source>* terms;
    int64_t term_count;
    int64_t rows, columns;
    bool along;    // columns of y run along the rows of the matrices
    Dropout drop;  // of x
    const T* left;
    int64_t left_stride;
    DenseRows<T> right;
    int64_t rank;
    Dropout low_drop;  // of left · right
    float scale;
    Y* y;
    Grid grid;
    int64_t next;  // first task that nobody has taken
};

// The left operand as tiles want it: itself where its type is the panel's and it is whole, else a copy.
template <class P>
struct Left {
    const typename P::Value* values;
    int64_t stride;
};
template <class P, class T>
HALFBYTE_INLINE Left<P> left_operand(const T* values, int64_t stride, int64_t first_row, int64_t rows,
                                     int64_t begin, int64_t count, int64_t columns, const Dropout& dropout,
                                     typename P::Value* copy) {
    using Value = typename P::Value;
    values += first_row * stride + begin;
    constexpr bool same = sizeof(T) == sizeof(Value);
    if (same && dropout.threshold == 0) return {reinterpret_cast<const Value*>(values), stride};
    const int64_t copy_stride = round_up(count, lanes), whole = count / lanes * lanes;
    for (int64_t i = 0; i < rows; ++i) {
        const T* row = values + i * stride;
        Value* out = copy + i * copy_stride;
        if constexpr (same) {
            memcpy(static_cast<void*>(out), row, static_cast<size_t>(round_up(count, P::depth)) * sizeof(T));
        } else {
            for (int64_t k = 0; k < whole; k += lanes) store(out + k, load(row + k));
            if (whole < count) {
                T padded[lanes] = {};
                memcpy(static_cast<void*>(padded), row + whole,
                       static_cast<size_t>(count - whole) * sizeof(T));
                store(out + whole, load(padded));
            }
        }
        if (dropout.threshold != 0) drop(out, first_row + i, begin, count, columns, dropout);
    }
    return {copy, copy_stride};
}

template <class P, class S, class Matrix>
HALFBYTE_INLINE void fill_panel(bool along, Matrix& matrix, int64_t begin, int64_t count,
                                int64_t first_column, int64_t columns, typename P::Value* panel) {
    if (along) {
        fill_along<P, S>(matrix, begin, count, first_column, columns, panel);
    } else {
        fill_across<P, S>(matrix, begin, count, first_column, columns, panel);
    }
}

// Adds the rows of a tile of left · right, without what is dropped, to those of `sums`, and stores them.
template <class P, class S, class Y>
void store_with_dropped(const float* sums, const float* low, int64_t rows, int64_t columns, float scale,
                        int64_t first_row, int64_t first_column, int64_t y_columns, const Dropout& dropout,
                        Y* y) {
    for (int64_t i = 0; i < rows; ++i) {
        float total[S::columns], kept[S::columns];
        store_row<P, S>(sums + i * S::columns, scale, S::columns, total);
        store_row<P, S>(low + i * S::columns, scale, S::columns, kept);
        drop(kept, first_row + i, first_column, S::columns, y_columns, dropout);
        for (int v = 0; v < S::columns; v += lanes)
            store(total + v, multiply_add(load(kept + v), broadcast(1.0f), load(total + v)));
        store_row<Singles, S>(total, 1.0f, columns, y + i * y_columns);
    }
}

// A task: which part of y it makes, and where.
template <class Y>
struct Part {
    int64_t first_row, first_column, rows, columns;
    int64_t width;  // columns, rounded up to whole tiles
    float* sums;
    Y* y;
};

// Adds one block of the sum to the sums of a task's tiles; after the last block, stores them.
template <class P, class S, class T, class Y, class Matrix>
HALFBYTE_INLINE void multiply_block(const Product<T, Y, Matrix>& job, const Part<Y>& part, Left<P> a,
                                    const typename P::Value* panel, int64_t count, bool fresh, bool last,
                                    Left<P> low, const typename P::Value* low_panel) {
    const int64_t rank_room = round_up(job.rank, lanes * P::depth), steps = pieces(count, P::depth);
    for (int64_t i = 0; i < part.rows; i += S::rows) {
        const int64_t tall = least(S::rows, part.rows - i);
        const MultiplyTile<P> multiply_them = multiply_tiles<P, S>[tall - 1];
        for (int64_t c = 0; c < part.columns; c += S::columns) {
            float* const tile = part.sums + i * part.width + c / S::columns * S::sums;
            multiply_them(a.values + i * a.stride, a.stride, panel + c * padded_steps<P>(count) * P::depth,
                          steps, tile, fresh);
            if (!last) continue;
            Y* const out = part.y + i * job.columns + c;
            if (job.rank > 0 && job.low_drop.threshold != 0) {
                alignas(64) float low_tile[S::sums];
                multiply_them(low.values + i * low.stride, low.stride, low_panel + c * rank_room,
                              pieces(job.rank, P::depth), low_tile, true);
                store_with_dropped<P, S>(tile, low_tile, tall, part.columns - c, job.scale,
                                         part.first_row + i, part.first_column + c, job.columns, job.low_drop,
                                         out);
                continue;
            }
            if (job.rank > 0)
                multiply_them(low.values + i * low.stride, low.stride, low_panel + c * rank_room,
                              pieces(job.rank, P::depth), tile, false);
            for (int64_t r = 0; r < tall; ++r)
                store_row<P, S>(tile + r * S::columns, job.scale, part.columns - c, out + r * job.columns);
        }
    }
}

template <class P, class S, class T, class Y, class Matrix>
void run_task(Product<T, Y, Matrix>& job, int64_t task) {
    using Value = typename P::Value;
    const Grid& grid = job.grid;
    const bool cut = task >= grid.whole;
    const int64_t block = cut ? grid.whole + (task - grid.whole) / grid.strips : task;
    const int64_t strip = cut ? (task - grid.whole) % grid.strips : 0;
    const int64_t first_row = block / grid.column_tasks * grid.rows + strip * grid.strip_rows;
    const int64_t first_column = block % grid.column_tasks * grid.columns;
    const int64_t rows = least(cut ? least(grid.strip_rows, grid.rows - strip * grid.strip_rows) : grid.rows,
                               job.rows - first_row);
    if (rows <= 0) return;
    const int64_t columns = least(job.grid.columns, job.columns - first_column);
    const int64_t width = round_up(columns, S::columns);

    const bool copies = sizeof(T) != sizeof(Value) || job.drop.threshold != 0;
    int64_t deepest = 0;
    for (int64_t t = 0; t < job.term_count; ++t)
        if (job.terms[t].depth > deepest) deepest = job.terms[t].depth;
    const int64_t span = least(P::depth_block, round_up(deepest, lanes * P::depth));
    const int64_t rank_room = round_up(job.rank, lanes * P::depth);
    const int64_t sums_size = round_up(rows, S::rows) * width;
    float* const sums = static_cast<float*>(thread_buffer(
        static_cast<size_t>(sums_size) * sizeof(float) +
        static_cast<size_t>((span + rank_room) * (width + (copies ? rows : 0))) * sizeof(Value)));
    Value* const panel = reinterpret_cast<Value*>(sums + sums_size);
    Value* const low_panel = panel + span * width;
    Value* const copy = low_panel + rank_room * width;
    Value* const low_copy = copy + span * rows;

    const Part<Y> part = {
        first_row, first_column, rows, columns, width, sums, job.y + first_row * job.columns + first_column};
    DenseRows<T> right = job.right;
    for (const auto* term = job.terms; term != job.terms + job.term_count; ++term) {
        Matrix matrix(term->source);
        for (int64_t begin = 0; begin < term->depth; begin += span) {
            const int64_t count = least(span, term->depth - begin);
            const bool fresh = term == job.terms && begin == 0;
            const bool last = term + 1 == job.terms + job.term_count && begin + count == term->depth;
            fill_panel<P, S>(job.along, matrix, begin, count, first_column, columns, panel);
            const auto a = left_operand<P>(term->x, term->x_stride, first_row, rows, begin, count,
                                           term->depth, job.drop, copy);
            auto low = a;
            if (last && job.rank > 0) {
                fill_panel<P, S>(job.along, right, 0, job.rank, first_column, columns, low_panel);
                low = left_operand<P>(job.left, job.left_stride, first_row, rows, 0, job.rank, job.rank,
                                      Dropout{0, 0}, low_copy);
            }
            multiply_block<P, S>(job, part, a, panel, count, fresh, last, low, low_panel);
        }
    }
}

// Tasks are taken one by one, so that a thread that is slowed down takes fewer. Which thread computes a task
// does not show in its result.
template <class P, class S, class T, class Y, class Matrix>
void run_tasks(void* context, int64_t, int64_t) {
    auto& job = *static_cast<Product<T, Y, Matrix>*>(context);
    for (;;) {
        const int64_t task = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (task >= job.grid.tasks) return;
        run_task<P, S>(job, task);
    }
}

template <class P, class S, class T, class Y, class Matrix>
HALFBYTE_INLINE void run_product(Product<T, Y, Matrix> job, int threads) {
    job.grid = make_grid<S>(job.rows, job.columns, threads);
    parallel_for(job.grid.tasks, 1, threads, run_tasks<P, S, T, Y, Matrix>, &job);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
