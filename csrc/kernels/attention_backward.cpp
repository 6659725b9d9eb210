// Attention's backward. With P = exp(score - logsumexp), recomputed a tile at a time,
//
//     dV = P' dO      dP = dO V'      dS = P (dP - rowsum(dO out))      dQ = scale dS K      dK = scale dS' Q
//
// and, under a soft cap, dS times 1 - tanh^2. FlashAttention-2 (arXiv 2307.08691), algorithm 2. A task is one
// query head: its dQ is its own, and what it adds to dK and dV is kept apart until the heads that share them
// are added up in order. So nothing is atomic and the sums are the same whoever computes them.

#include "../threads.hpp"
#include "attention_tiles.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Sizes in words. A share is what one thread works in; a partial is one query head's dK and dV.
struct Layout {
    int64_t per_word, width, words, queries, keys, tiles;
    Layout(const AttentionShape& s, int64_t elements_per_word)
        : per_word(elements_per_word),
          width(round_up(s.head_dim, 16)),
          words(width / per_word),
          queries(round_up(s.queries, query_tile)),
          keys(round_up(s.keys, key_tile)),
          tiles(queries / query_tile) {}

    int64_t key_words() const { return keys * words; }
    int64_t query_words() const { return queries * words; }
    int64_t sight_words() const { return round_up(tiles * sizeof(Sight) / sizeof(Word), 16); }
    int64_t share() const {
        return 3 * key_words() + 4 * query_words() + query_tile * words + queries * width + 2 * queries +
               2 * key_tile * width + sight_words();
    }
    int64_t partial() const { return 2 * keys * width; }
};

// Heads that share keys and values are one task when that keeps all threads busy, and a task each otherwise.
HALFBYTE_INLINE bool is_split(const AttentionShape& s, int64_t threads) {
    const int64_t groups = s.batches * s.kv_heads, group = s.heads / s.kv_heads;
    const int64_t whole = (groups + threads - 1) / threads * group;
    const int64_t split = (groups * group + threads - 1) / threads;
    return 10 * split < 9 * whole;
}

// How many partials are alive at a time: a thread's one after the other, or every head's at once. A whole
// task needs one for the running sum.
HALFBYTE_INLINE int64_t partials(const AttentionShape& s, int64_t threads) {
    return is_split(s, threads) ? s.batches * s.heads : threads;
}

struct Job {
    const AttentionBackward& call;
    Layout layout;
    int64_t threads;
    bool split;

    Word* share(int64_t thread) const {
        return static_cast<Word*>(call.forward.workspace) + thread * layout.share();
    }
    float* partial(int64_t i) const { return share(threads) + i * layout.partial(); }
};

// A thread's part of the workspace.
struct Share {
    Word *key_rows, *key_steps, *value_rows;
    Word *query_lanes, *query_steps, *dout_lanes, *dout_steps, *rows;
    float *dq, *delta, *logsumexp, *dk_tile, *dv_tile;
    Sight* sights;

    Share(const Layout& l, Word* at) {
        key_rows = at, at += l.key_words();
        key_steps = at, at += l.key_words();
        value_rows = at, at += l.key_words();
        query_lanes = at, at += l.query_words();
        query_steps = at, at += l.query_words();
        dout_lanes = at, at += l.query_words();
        dout_steps = at, at += l.query_words();
        rows = at, at += query_tile * l.words;
        dq = at, at += l.queries * l.width;
        delta = at, at += l.queries;
        logsumexp = at, at += l.queries;
        dk_tile = at, at += key_tile * l.width;
        dv_tile = at, at += key_tile * l.width;
        sights = reinterpret_cast<Sight*>(at);
    }
};

template <class T>
HALFBYTE_INLINE float dot(const T* a, const T* b, int64_t count) {
    F32 sums = broadcast(0.0f);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) sums = multiply_add(load(a + i), load(b + i), sums);
    if (i < count) {
        T left[lanes] = {}, right[lanes] = {};
        memcpy(left, a + i, static_cast<size_t>(count - i) * sizeof(T));
        memcpy(right, b + i, static_cast<size_t>(count - i) * sizeof(T));
        sums = multiply_add(load(left), load(right), sums);
    }
    float each[lanes], sum = 0.0f;
    store(each, sums);
    for (int lane = 0; lane < lanes; ++lane) sum += each[lane];
    return sum;
}

template <class Steps, class T>
void lay_keys(const Job& job, int64_t batch, int64_t kv_head, Share* share) {
    const Attention& f = job.call.forward;
    const Layout& l = job.layout;
    const AttentionShape& s = f.shape;
    lay_rows<Steps>(rows_of<T>(f.k, batch, kv_head), f.k.row_stride, s.head_dim, s.keys, l.keys, l.width,
                    share->key_rows);
    lay_rows<Steps>(rows_of<T>(f.v, batch, kv_head), f.v.row_stride, s.head_dim, s.keys, l.keys, l.width,
                    share->value_rows);
    lay_steps<Steps>(share->key_rows, l.keys, l.width, share->key_steps);
    for (int64_t tile = 0; tile < l.tiles; ++tile) look(f, batch, tile * query_tile, &share->sights[tile]);
}

template <class Steps, class T>
void lay_queries(const Job& job, int64_t batch, int64_t head, Share* share) {
    const Attention& f = job.call.forward;
    const Layout& l = job.layout;
    const AttentionShape& s = f.shape;
    const int64_t tile_words = query_tile * l.words;
    const auto lay = [&](const AttentionRows& from, int64_t tile, Word* as_lanes, Word* as_steps) {
        const T* first = rows_of<T>(from, batch, head) + tile * query_tile * from.row_stride;
        // One float32 to a word: the rows are the steps, and are laid where they will be read.
        Word* rows = Steps::per_word == 1 ? as_steps + tile * tile_words : share->rows;
        lay_rows<Steps>(first, from.row_stride, s.head_dim, share->sights[tile].count, query_tile, l.width,
                        rows);
        lay_lanes(rows, l.words, as_lanes + tile * tile_words);
        lay_steps<Steps>(rows, query_tile, l.width, as_steps + tile * tile_words);
    };
    for (int64_t tile = 0; tile < l.tiles; ++tile) {
        lay(f.q, tile, share->query_lanes, share->query_steps);
        lay(job.call.dout, tile, share->dout_lanes, share->dout_steps);
    }
    const float* logsumexp = f.logsumexp + (batch * s.heads + head) * s.queries;
    const T* dout = rows_of<T>(job.call.dout, batch, head);
    for (int64_t query = 0; query < l.queries; ++query) {
        const bool exists = query < s.queries;
        const T* out =
            static_cast<const T*>(f.out) + ((batch * s.queries + query) * s.heads + head) * s.head_dim;
        share->logsumexp[query] = exists ? logsumexp[query] * log2_e : 0.0f;
        share->delta[query] = exists ? dot(dout + query * job.call.dout.row_stride, out, s.head_dim) : 0.0f;
    }
    memset(share->dq, 0, static_cast<size_t>(l.queries * l.width) * sizeof(float));
}

// The weights of a tile and the gradients of its scores, for sums over queries (`by_query`) and over keys
// (`by_key`).
template <class Steps>
struct Weights {
    alignas(64) Word p_by_query[key_tile * query_tile];
    alignas(64) Word ds_by_query[key_tile * query_tile];
    alignas(64) Word ds_by_key[Steps::per_word == 1 ? 1 : key_tile * query_tile / Steps::per_word];
};

template <class Steps>
HALFBYTE_INLINE void weigh_strip(const Attention& call, const Layout& l, const Share& share, int64_t tile,
                                 int64_t begin, int64_t key, Weights<Steps>* weights) {
    alignas(64) float scores[strip * query_tile];
    alignas(64) float dp[strip * query_tile];
    const int64_t first = tile * query_tile, tile_words = query_tile * l.words;
    const Sight& sight = share.sights[tile];
    multiply_strip<Steps>(share.key_rows + key * l.words, share.query_lanes + tile * tile_words, l.words,
                          score_factor(call), scores);
    multiply_strip<Steps>(share.value_rows + key * l.words, share.dout_lanes + tile * tile_words, l.words,
                          1.0f, dp);
    finish_scores(call, sight, key, scores);
    const bool capped = call.softcap > 0;
    const F32 one = broadcast(1.0f);
    const F32 per_cap = broadcast(capped ? 1.0f / (call.softcap * log2_e) : 0.0f);
    for (int64_t lane = 0; lane < query_tile; lane += lanes) {
        const F32 logsumexp = load(share.logsumexp + first + lane), delta = load(share.delta + first + lane);
        for (int64_t k = 0; k < strip; k += 2) {
            F32 ds[2];
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t at = (k + i) * query_tile + lane;
                const F32 s = load(scores + at), p = exp2(s - logsumexp);
                ds[i] = p * (load(dp + at) - delta);
                if (capped) {
                    const F32 t = max(s * per_cap, broadcast(-1.0f));  // a hidden score is far below the cap
                    ds[i] = ds[i] * (one - t * t);
                }
                store_row(Steps{}, weights->p_by_query, key - begin + k + i, lane, p);
                store_row(Steps{}, weights->ds_by_query, key - begin + k + i, lane, ds[i]);
            }
            if constexpr (Steps::per_word > 1)
                store_steps(Steps{}, weights->ds_by_key, key - begin + k, lane, ds[0], ds[1]);
        }
    }
}

// One head's dQ, and what it adds to dK and dV: `partial` += both.
template <class Steps>
void differentiate_head(const Attention& call, const Layout& l, const Share& share, float* partial) {
    constexpr int64_t per_word = Steps::per_word;
    constexpr int64_t row_words = query_tile / per_word;
    const int64_t tile_words = query_tile * l.words;
    Weights<Steps> weights;
    for (int64_t begin = 0; begin < call.shape.keys; begin += key_tile) {
        const size_t bytes = static_cast<size_t>(key_tile * l.width) * sizeof(float);
        memset(share.dk_tile, 0, bytes);
        memset(share.dv_tile, 0, bytes);
        for (int64_t tile = 0; tile < l.tiles; ++tile) {
            const Sight& sight = share.sights[tile];
            const int64_t low = greatest(begin, sight.first_from / strip * strip);
            const int64_t high = least(begin + key_tile, round_up(sight.last_to + 1, strip));
            if (low >= high) continue;
            // Register tiles reach beyond a part of the rows: those weigh nothing.
            const auto clear = [&](int64_t first, int64_t last) {
                const size_t size = static_cast<size_t>((last - first) * row_words) * sizeof(Word);
                memset(weights.p_by_query + first * row_words, 0, size);
                memset(weights.ds_by_query + first * row_words, 0, size);
            };
            clear(0, low - begin);
            clear(high - begin, key_tile);
            for (int64_t key = low; key < high; key += strip)
                weigh_strip<Steps>(call, l, share, tile, begin, key, &weights);

            const Word* dout = share.dout_steps + tile * tile_words;
            const Word* queries = share.query_steps + tile * tile_words;
            add_product<Steps>({weights.p_by_query, row_words, 1}, dout, l.width, row_words, share.dv_tile,
                               l.width, low - begin, high - begin, l.width);
            add_product<Steps>({weights.ds_by_query, row_words, 1}, queries, l.width, row_words,
                               share.dk_tile, l.width, low - begin, high - begin, l.width);
            const Word* by_key = per_word == 1 ? weights.ds_by_query : weights.ds_by_key;
            const Word* key_steps = per_word == 1 ? share.key_rows : share.key_steps;
            add_product<Steps>({by_key + (low - begin) / per_word * query_tile, 1, query_tile},
                               key_steps + low * l.words, l.width, (high - low) / per_word,
                               share.dq + tile * query_tile * l.width, l.width, 0, sight.count, l.width);
        }
        float* dk = partial + begin * l.width;
        float* dv = dk + l.keys * l.width;
        for (int64_t i = 0; i < key_tile * l.width; i += lanes) {
            store(dk + i, load(dk + i) + load(share.dk_tile + i));
            store(dv + i, load(dv + i) + load(share.dv_tile + i));
        }
    }
}

template <class T>
void write_keys(const Job& job, int64_t batch, int64_t kv_head, const float* sum) {
    const AttentionShape& s = job.call.forward.shape;
    const Layout& l = job.layout;
    for (int64_t key = 0; key < s.keys; ++key) {
        const int64_t to = ((batch * s.keys + key) * s.kv_heads + kv_head) * s.head_dim;
        const float* dk = sum + key * l.width;
        write_row(dk, job.call.forward.scale, s.head_dim, static_cast<T*>(job.call.dk) + to);
        write_row(dk + l.keys * l.width, 1.0f, s.head_dim, static_cast<T*>(job.call.dv) + to);
    }
}

// The tasks of some threads; a thread's number names its share of the workspace.
template <class Steps, class T>
void differentiate(void* context, int64_t first_thread, int64_t last_thread) {
    const Job& job = *static_cast<const Job*>(context);
    const Attention& f = job.call.forward;
    const AttentionShape& s = f.shape;
    const Layout& l = job.layout;
    const int64_t group = s.heads / s.kv_heads, unit = job.split ? 1 : group;
    const int64_t tasks = s.batches * s.heads / unit;
    const size_t bytes = static_cast<size_t>(l.partial()) * sizeof(float);
    for (int64_t thread = first_thread; thread < last_thread; ++thread) {
        Share share(l, job.share(thread));
        int64_t laid = -1;
        for (int64_t task = tasks * thread / job.threads; task < tasks * (thread + 1) / job.threads; ++task) {
            const int64_t batch = task * unit / s.heads, first = task * unit % s.heads,
                          kv_head = first / group;
            if (laid != batch * s.kv_heads + kv_head) {
                lay_keys<Steps, T>(job, batch, kv_head, &share);
                laid = batch * s.kv_heads + kv_head;
            }
            float* partial = job.partial(job.split ? task : thread);
            memset(partial, 0, bytes);
            for (int64_t head = first; head < first + unit; ++head) {
                lay_queries<Steps, T>(job, batch, head, &share);
                differentiate_head<Steps>(f, l, share, partial);
                for (int64_t query = 0; query < s.queries; ++query) {
                    const int64_t to = ((batch * s.queries + query) * s.heads + head) * s.head_dim;
                    write_row(share.dq + query * l.width, f.scale, s.head_dim,
                              static_cast<T*>(job.call.dq) + to);
                }
            }
            if (!job.split) write_keys<T>(job, batch, kv_head, partial);
        }
    }
}

template <class T>
void add_heads(void* context, int64_t begin, int64_t end) {
    const Job& job = *static_cast<const Job*>(context);
    const AttentionShape& s = job.call.forward.shape;
    const int64_t group = s.heads / s.kv_heads;
    for (int64_t task = begin; task < end; ++task) {
        float* sum = job.partial(task * group);
        for (int64_t head = 1; head < group; ++head) {
            const float* more = job.partial(task * group + head);
            for (int64_t i = 0; i < job.layout.partial(); i += lanes)
                store(sum + i, load(sum + i) + load(more + i));
        }
        write_keys<T>(job, task / s.kv_heads, task % s.kv_heads, sum);
    }
}

template <class Steps, class T>
void run(const AttentionBackward& call, int threads) {
    const AttentionShape& s = call.forward.shape;
    Job job = {call, Layout(s, Steps::per_word), threads, is_split(s, threads)};
    const int64_t cost = s.batches * s.heads * s.queries * (s.keys / 2 + 1) * s.head_dim;
    // Shares are tasks here; a small call is done by one thread, in all shares' turn.
    parallel_for(threads, cost < 524288 ? threads : 1, threads, differentiate<Steps, T>, &job);
    if (job.split) parallel_for(s.batches * s.kv_heads, 1, threads, add_heads<T>, &job);
}

}  // namespace

int64_t attention_backward_workspace_bytes(const AttentionShape& s, int threads) {
    const Layout l(s, 1);  // the greatest: one number to a word
    const int64_t words = threads * l.share() + partials(s, threads) * l.partial();
    return words * static_cast<int64_t>(sizeof(Word));
}

void attention_backward(const AttentionBackward& call, int threads) {
    switch (call.forward.dtype) {
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
