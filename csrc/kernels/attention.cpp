// Attention's forward: a task is one head's 48 queries against every key they see, 96 at a time, with a
// running maximum and sum. FlashAttention-2 (arXiv 2307.08691), algorithm 1.

#include <cmath>

#include "../threads.hpp"
#include "attention_tiles.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// The maximum that weights are taken relative to is raised only when a score exceeds it by this much (in
// units of ln 2): weights up to 2^8 are as exact as weights up to 1, and rescaling the sums becomes rare.
constexpr float slack = 8.0f;

struct Layout {  // of the workspace: for each key and value head the keys' rows, then the values' steps
    int64_t width, words, keys;
    explicit Layout(const AttentionShape& s, int64_t per_word)
        : width(round_up(s.head_dim, 16)), words(width / per_word), keys(round_up(s.keys, strip)) {}
    int64_t per_head() const { return 2 * keys * words; }
};

struct Job {
    const Attention& call;
    Layout layout;
    int64_t tiles;  // of queries, a head
};

template <class Steps, class T>
void lay_heads(void* context, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(context);
    const Attention& call = job.call;
    const AttentionShape& s = call.shape;
    const int64_t width = job.layout.width, words = job.layout.words, keys = job.layout.keys;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / s.kv_heads, head = task % s.kv_heads;
        Word* k = static_cast<Word*>(call.workspace) + task * job.layout.per_head();
        Word* v = k + keys * words;
        const T* from = rows_of<T>(call.v, batch, head);
        lay_rows<Steps>(rows_of<T>(call.k, batch, head), call.k.row_stride, s.head_dim, s.keys, keys, width,
                        k);
        if constexpr (Steps::per_word == 1) {
            lay_rows<Steps>(from, call.v.row_stride, s.head_dim, s.keys, keys, width, v);
        } else {
            alignas(64) Word rows[strip * max_head_dim];
            for (int64_t key = 0; key < keys; key += strip) {
                lay_rows<Steps>(from + key * call.v.row_stride, call.v.row_stride, s.head_dim,
                                least(strip, s.keys - key), strip, width, rows);
                lay_steps<Steps>(rows, strip, width, v + key * words);
            }
        }
    }
}

struct State {  // of one tile's softmax
    alignas(64) float reference[query_tile];
    alignas(64) float sum[query_tile];
    alignas(64) float out[query_tile * max_head_dim];
};

// Raise the reference of every lane to its maximum so far, and bring sums and outputs to it.
void raise_reference(State* state, const float* maxima, int64_t width) {
    alignas(64) float factor[query_tile];
    for (int64_t lane = 0; lane < query_tile; lane += lanes) {
        const F32 before = load(state->reference + lane), after = max(before, load(maxima + lane));
        const F32 by = exp2(before - after);
        store(state->reference + lane, after);
        store(state->sum + lane, load(state->sum + lane) * by);
        store(factor + lane, by);
    }
    for (int64_t query = 0; query < query_tile; ++query) {
        const F32 by = broadcast(factor[query]);
        float* row = state->out + query * width;
        for (int64_t i = 0; i < width; i += lanes) store(row + i, load(row + i) * by);
    }
}

template <class Steps>
void attend(const Attention& call, const Sight& sight, const Layout& layout, const Word* queries,
            const Word* keys, const Word* values, State* state) {
    constexpr int64_t per_word = Steps::per_word;
    alignas(64) float scores[key_tile * query_tile];
    alignas(64) Word weights[key_tile * query_tile];
    const int64_t stop = round_up(sight.last_to + 1, strip);
    const float factor = score_factor(call);
    for (int64_t begin = sight.first_from / strip * strip; begin < stop; begin += key_tile) {
        const int64_t count = least(key_tile, stop - begin);
        alignas(64) float maxima[query_tile];
        for (int64_t lane = 0; lane < query_tile; lane += lanes) store(maxima + lane, broadcast(hidden));
        for (int64_t key = 0; key < count; key += strip) {
            float* at = scores + key * query_tile;
            multiply_strip<Steps>(keys + (begin + key) * layout.words, queries, layout.words, factor, at);
            finish_scores(call, sight, begin + key, at);
            for (int64_t lane = 0; lane < query_tile; lane += lanes) {
                F32 most = load(maxima + lane);
                for (int64_t k = 0; k < strip; ++k) most = max(most, load(at + k * query_tile + lane));
                store(maxima + lane, most);
            }
        }
        bool raise = false;
        for (int64_t lane = 0; lane < query_tile; lane += lanes)
            raise |= any_above(load(maxima + lane), load(state->reference + lane) + broadcast(slack));
        if (raise) raise_reference(state, maxima, layout.width);

        for (int64_t lane = 0; lane < query_tile; lane += lanes) {
            const F32 reference = load(state->reference + lane);
            F32 even = load(state->sum + lane), odd = broadcast(0.0f);
            for (int64_t key = 0; key < count; key += 2) {
                const float* at = scores + key * query_tile + lane;
                const F32 first = exp2(load(at) - reference),
                          second = exp2(load(at + query_tile) - reference);
                even = even + first;
                odd = odd + second;
                store_steps(Steps{}, weights, key, lane, first, second);
            }
            store(state->sum + lane, even + odd);
        }
        add_product<Steps>({weights, 1, query_tile}, values + begin * layout.words, layout.width,
                           count / per_word, state->out, layout.width, 0, sight.count, layout.width);
    }
}

// Task order within a head: first tile, last tile, second, last but one ... Their costs add up to the same,
// so that any split of the tasks into equal ranges is fair.
HALFBYTE_INLINE int64_t tile_of(int64_t i, int64_t tiles) { return i % 2 == 0 ? i / 2 : tiles - 1 - i / 2; }

template <class Steps, class T>
void attend_tiles(void* context, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(context);
    const Attention& call = job.call;
    const AttentionShape& s = call.shape;
    const Layout& layout = job.layout;
    alignas(64) Word rows[query_tile * max_head_dim / Steps::per_word];
    alignas(64) Word queries[query_tile * max_head_dim / Steps::per_word];
    State state;
    Sight sight;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / job.tiles % s.heads, batch = task / job.tiles / s.heads;
        const int64_t first = tile_of(task % job.tiles, job.tiles) * query_tile;
        look(call, batch, first, &sight);
        const T* from = rows_of<T>(call.q, batch, head) + first * call.q.row_stride;
        lay_rows<Steps>(from, call.q.row_stride, s.head_dim, sight.count, query_tile, layout.width, rows);
        lay_lanes(rows, layout.words, queries);

        const int64_t kv_head = batch * s.kv_heads + head / (s.heads / s.kv_heads);
        const Word* keys = static_cast<const Word*>(call.workspace) + kv_head * layout.per_head();
        for (int64_t lane = 0; lane < query_tile; ++lane) {
            state.reference[lane] = -1e30f;  // far above `hidden`, far below any score
            state.sum[lane] = 0.0f;
        }
        memset(state.out, 0, static_cast<size_t>(query_tile * layout.width) * sizeof(float));
        attend<Steps>(call, sight, layout, queries, keys, keys + layout.keys * layout.words, &state);

        for (int64_t query = 0; query < sight.count; ++query) {
            T* to = static_cast<T*>(call.out) +
                    ((batch * s.queries + first + query) * s.heads + head) * s.head_dim;
            write_row(state.out + query * layout.width, 1.0f / state.sum[query], s.head_dim, to);
            call.logsumexp[(batch * s.heads + head) * s.queries + first + query] =
                state.reference[query] * ln_2 + logf(state.sum[query]);
        }
    }
}

template <class Steps, class T>
void run(const Attention& call, int threads) {
    const AttentionShape& s = call.shape;
    Job job = {call, Layout(s, Steps::per_word), (s.queries + query_tile - 1) / query_tile};
    // Waking a thread costs as much as some hundred thousand products.
    const int64_t tile_cost = query_tile * (s.keys / 2 + 1) * s.head_dim;
    const int64_t head_cost = s.keys * s.head_dim;
    parallel_for(s.batches * s.kv_heads, 1 + 65536 / head_cost, threads, lay_heads<Steps, T>, &job);
    parallel_for(s.batches * s.heads * job.tiles, 1 + 524288 / tile_cost, threads, attend_tiles<Steps, T>,
                 &job);
}

}  // namespace

int64_t attention_workspace_bytes(const AttentionShape& s) {
    return s.batches * s.kv_heads * Layout(s, 1).per_head() * static_cast<int64_t>(sizeof(Word));
}

void attention(const Attention& call, int threads) {
    switch (call.dtype) {
        case DType::f32:
            return run<FloatSteps, float>(call, threads);
        case DType::f16:
            return run<FloatSteps, f16>(call, threads);
        case DType::bf16:
#if defined(__AVX512BF16__)
            return run<PairSteps, bf16>(call, threads);
#else
            return run<FloatSteps, bf16>(call, threads);
#endif
    }
}

}  // namespace halfbyte::HALFBYTE_ISA
