// y = x · Wᵀ + left · rightᵀ, or with W in place of Wᵀ, for a weight of 4-bit codes.
//
// A task is a block of rows times a block of columns of y. It walks the sum in blocks; for each it expands
// the part of the weight it needs into a panel that stays in cache, and multiplies every tile of its rows by
// it. The whole weight is never in memory. The low-rank term is so many more columns of the sum, added while
// a tile's sums are still in the first-level cache. A handful of rows, as in decoding, reads each code for
// one product: that is matvec_4bit.hpp.

#include "../simd/isa.hpp"
#include "../threads.hpp"
#include "matvec_4bit.hpp"
#include "panels.hpp"
#include "table.hpp"
#include "tiles.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Sums of a task fit the second-level cache beside the panel.
constexpr int64_t most_rows = 516;
constexpr int64_t panel_columns = 128;

struct Grid {
    int64_t rows, columns;  // of a task
    int64_t column_tasks, tasks;
};

HALFBYTE_INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

HALFBYTE_INLINE Grid make_grid(int64_t rows, int64_t columns, int threads) {
    // Panels are expanded once a block of rows, so rows are cut last; four tasks a thread keep all of them
    // busy.
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    int64_t row_tasks = pieces(rows, most_rows), width = round_up(panel_columns, tile_columns);
    if (row_tasks * pieces(columns, width) < wanted) width = round_up(width / 2, tile_columns);
    while (row_tasks * pieces(columns, width) < wanted && pieces(rows, row_tasks) > 8 * tile_rows)
        row_tasks *= 2;
    const int64_t height = round_up(pieces(rows, row_tasks), tile_rows);
    const int64_t across = pieces(columns, width);
    return {height, width, across, pieces(rows, height) * across};
}

struct Job {
    const Matmul4bit& call;
    Grid grid;
    int64_t depth, columns;  // of the sum, of y
    int64_t next;            // first task that nobody has taken
};

// The left operand as tiles want it: itself where its type is the panel's, else a widened copy.
template <class P>
struct Left {
    const typename P::Value* values;
    int64_t stride;
};
template <class P, class T>
HALFBYTE_INLINE Left<P> left_operand(const T* values, int64_t stride, int64_t rows, int64_t count,
                                     typename P::Value* copy) {
    if constexpr (sizeof(T) == sizeof *copy) {
        return {values, stride};
    } else {
        const int64_t copy_stride = round_up(count, lanes), whole = count / lanes * lanes;
        for (int64_t i = 0; i < rows; ++i) {
            const T* row = values + i * stride;
            float* out = copy + i * copy_stride;
            for (int64_t k = 0; k < whole; k += lanes) store(out + k, load(row + k));
            if (whole < count) {
                T padded[lanes] = {};
                memcpy(padded, row + whole, static_cast<size_t>(count - whole) * sizeof(T));
                store(out + whole, load(padded));
            }
        }
        return {copy, copy_stride};
    }
}

template <class P, class Matrix>
HALFBYTE_INLINE void fill_panel(bool along, Matrix& matrix, int64_t begin, int64_t count,
                                int64_t first_column, int64_t columns, typename P::Value* panel) {
    if (along) {
        fill_along<P>(matrix, begin, count, first_column, columns, panel);
    } else {
        fill_across<P>(matrix, begin, count, first_column, columns, panel);
    }
}

template <class P, class T>
void run_task(const Job& job, int64_t task) {
    using Value = typename P::Value;
    const Matmul4bit& call = job.call;
    const Grid& grid = job.grid;
    const int64_t first_row = task / grid.column_tasks * grid.rows;
    const int64_t first_column = task % grid.column_tasks * grid.columns;
    const int64_t rows = least(grid.rows, call.rows - first_row);
    const int64_t columns = least(grid.columns, job.columns - first_column);
    const int64_t width = round_up(columns, tile_columns);
    const T* x = static_cast<const T*>(call.x) + first_row * call.x_stride;
    T* y = static_cast<T*>(call.y) + first_row * job.columns + first_column;

    constexpr bool copies = sizeof(T) != sizeof(Value);
    const int64_t block = least(P::depth_block, round_up(job.depth, lanes * P::depth));
    const int64_t rank_room = round_up(call.rank, lanes * P::depth);
    const int64_t sums_size = round_up(rows, tile_rows) * width;
    float* const sums = static_cast<float*>(thread_buffer(
        static_cast<size_t>(sums_size) * sizeof(float) +
        static_cast<size_t>((block + rank_room) * (width + (copies ? rows : 0))) * sizeof(Value)));
    Value* const panel = reinterpret_cast<Value*>(sums + sums_size);
    Value* const low_panel = panel + block * width;
    Value* const copy = low_panel + rank_room * width;
    Value* const low_copy = copy + block * rows;

    QuantizedRows<T> weight(call.weight);
    for (int64_t begin = 0; begin < job.depth; begin += block) {
        const int64_t count = least(block, job.depth - begin), steps = pieces(count, P::depth);
        const bool last = begin + count == job.depth;
        fill_panel<P>(call.transposed, weight, begin, count, first_column, columns, panel);
        const auto a = left_operand<P>(x + begin, call.x_stride, rows, count, copy);
        auto low = a;
        if (last && call.rank > 0) {
            const T* left = static_cast<const T*>(call.left) + first_row * call.left_stride;
            DenseRows<T> right(call.right, call.transposed ? job.columns : call.rank);
            fill_panel<P>(call.transposed, right, 0, call.rank, first_column, columns, low_panel);
            low = left_operand<P>(left, call.left_stride, rows, call.rank, low_copy);
        }
        for (int64_t i = 0; i < rows; i += tile_rows) {
            const int64_t tall = least(tile_rows, rows - i);
            const MultiplyTile<P> multiply = multiply_tiles<P>[tall - 1];
            for (int64_t c = 0; c < columns; c += tile_columns) {
                const int64_t tile = c / tile_columns;
                float* const tile_at = sums + i * width + tile * tile_sums;
                multiply(a.values + i * a.stride, a.stride, panel + c * padded_steps<P>(count) * P::depth,
                         steps, tile_at, begin == 0);
                if (!last) continue;
                if (call.rank > 0)
                    multiply(low.values + i * low.stride, low.stride, low_panel + c * rank_room,
                             pieces(call.rank, P::depth), tile_at, false);
                store_tile<P>(tile_at, tall, columns - c, y + i * job.columns + c, job.columns);
            }
        }
    }
}

// Tasks are taken one by one, so that a thread that is slowed down takes fewer. Which thread computes a task
// does not show in its result.
template <class P, class T>
void run_tasks(void* context, int64_t, int64_t) {
    Job& job = *static_cast<Job*>(context);
    for (;;) {
        const int64_t task = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (task >= job.grid.tasks) return;
        run_task<P, T>(job, task);
    }
}

}  // namespace

void matmul_4bit(const Matmul4bit& call, int threads) {
    if (is_matvec(call)) return matvec_4bit(call, threads);
    const int64_t out = call.weight.out_features, in = call.weight.in_features;
    Job job = {call, {}, call.transposed ? out : in, call.transposed ? in : out, 0};
    job.grid = make_grid(call.rows, job.columns, threads);
    void (*body)(void*, int64_t, int64_t) = run_tasks<Singles, float>;
    if (call.dtype == DType::bf16) body = run_tasks<Bf16Operand, bf16>;
    if (call.dtype == DType::f16) body = run_tasks<Singles, f16>;
    parallel_for(job.grid.tasks, 1, threads, body, &job);
}

}  // namespace halfbyte::HALFBYTE_ISA
