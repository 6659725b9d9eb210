// One token of one sequence through all layers of a Llama-family model, in one call and one team of threads.
//
// At batch 1 every weight is read for one product, so the time is that of reading the weights once; what has
// to be avoided is everything else. A layer is five stages, each of which begins when the last is done:
//
//   projected   norm(residual), then the rows of q, k and v
//   mixed       a head of queries against the cache
//   residual    += rows of the output projection
//   gated       norm(residual), then silu(gate) * up
//   residual    += rows of the down projection
//
// Rows and heads are taken piece by piece. A stage is done when its pieces are, not when every thread is
// there: one that has lost its core holds up nothing but what it took, and finds no piece left in the stages
// that it slept through. What it read for those may have been changed meanwhile, but then nothing comes of
// it: who gets a piece knows that the stage is not done. Which thread computes a row does not show in its
// result. Norms and an adapter's A·x are short, and each thread computes them for itself rather than wait
// for another. The residual, scores and all sums are float32; what is multiplied with a weight is rounded to
// bf16, and so are the keys and values of the cache.

#include "../simd/math.hpp"
#include "../threads.hpp"
#include "matvec_4bit.hpp"
#include "panels.hpp"
#include "table.hpp"
#include "tiles.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using P = Bf16Operand;
constexpr int64_t step = lanes * P::depth;  // bf16 values in a register
constexpr int64_t pieces = 4;  // a thread, of a stage; taking one costs a cache line's way between cores
HALFBYTE_INLINE int64_t stages(const DecodeToken& call) { return 5 * call.layer_count + 1; }

// What the team shares, laid out in the workspace. Rows that are multiplied with weights end in zeros.
struct Shared {
    explicit Shared(const DecodeToken& token)
        : call(token), queries(token.heads * token.head_dim), cached(token.kv_heads * token.head_dim) {}

    int64_t floats() const {
        const int64_t rows = round_up(queries, chunk) + round_up(call.intermediate, chunk);
        return 2 * (2 * stages(call) + call.hidden + call.intermediate + cached) + queries + rows / 2;
    }
    void lay_out(float* at) {
        next = reinterpret_cast<int64_t*>(at), at += 2 * stages(call);
        done = reinterpret_cast<int64_t*>(at), at += 2 * stages(call);
        residual = at, at += call.hidden;
        sums = at, at += call.hidden;
        projected = at, at += queries + 2 * cached;
        gate = at, at += call.intermediate;
        up = at, at += call.intermediate;
        mixed = reinterpret_cast<bf16*>(at), at += round_up(queries, chunk) / 2;
        gated = reinterpret_cast<bf16*>(at), at += round_up(call.intermediate, chunk) / 2;
        private_to_first = at;
    }

    const DecodeToken& call;
    const int64_t queries, cached;
    int64_t *next, *done;  // of each stage, the rows or heads that are taken, and done
    float *residual, *sums, *projected, *gate, *up;
    bf16 *mixed, *gated;
    float* private_to_first;
};

// sums += a * b. Four sums, since one would wait for itself; b has zeros up to a multiple of `chunk`.
HALFBYTE_INLINE void accumulate(const bf16* a, const bf16* b, int64_t n, F32* sums) {
    int64_t i = 0;
    for (; i + 4 * step <= n; i += 4 * step)
        for (int s = 0; s < 4; ++s)
            sums[s] = P::multiply_add(P::load(a + i + s * step), P::load(b + i + s * step), sums[s]);
    for (; i + step <= n; i += step) sums[0] = P::multiply_add(P::load(a + i), P::load(b + i), sums[0]);
    if (i < n) {
        bf16 tail[step] = {};
        memcpy(tail, a + i, static_cast<size_t>(n - i) * sizeof(bf16));
        sums[0] = P::multiply_add(P::load(tail), P::load(b + i), sums[0]);
    }
}
HALFBYTE_INLINE float total(const F32* sums) { return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])); }

HALFBYTE_INLINE float dot(const bf16* a, const bf16* b, int64_t n) {
    F32 sums[4] = {};
    accumulate(a, b, n, sums);
    return total(sums);
}
HALFBYTE_INLINE float dot(const bf16* a, const float* b, int64_t n) {
    F32 sum = broadcast(0.0f);
    for_registers(n, [&](int64_t i, auto access)
                         HALFBYTE_LAMBDA { sum = multiply_add(access.get(a + i), access.get(b + i), sum); });
    return reduce_add(sum);
}

// One thread of the team.
class Worker {
  public:
    Worker(Shared& shared, int team, float* at) : shared_(shared), call_(shared.call), team_(team) {
        x_ = reinterpret_cast<bf16*>(at), at += round_up(call_.hidden, chunk) / 2;
        low_ = at, at += 3 * call_.most_rank;
        query_ = at, at += call_.head_dim;
        new_key_ = at, at += call_.head_dim;
        new_key_bits_ = reinterpret_cast<bf16*>(at), at += call_.head_dim;
        scores_ = at;
        for (int64_t i = call_.hidden; i < round_up(call_.hidden, chunk); ++i) x_[i] = bf16{};
    }
    static int64_t floats(const DecodeToken& call) {
        return round_up(call.hidden, chunk) / 2 + 3 * (call.most_rank + call.head_dim) + call.position + 1;
    }

    void run() {
        for (int64_t index = 0; index < call_.layer_count; ++index) {
            const DecodeLayer& layer = call_.layers[index];
            normalize(shared_.residual, layer.attention_norm, call_.hidden, x_);
            project_queries_keys_values(layer);
            stage(call_.heads, 1, [&](int64_t head, int64_t) { attend(index, head); });
            add_projection(layer.linears[decode_output], shared_.mixed);
            normalize(shared_.residual, layer.mlp_norm, call_.hidden, x_);
            gate_and_up(layer);
            add_projection(layer.linears[decode_down], shared_.gated);
        }
        normalize(shared_.residual, call_.final_norm, call_.hidden, x_);
        stage(call_.vocabulary, 0, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                call_.logits[row] = dot(call_.head + row * call_.hidden, x_, call_.hidden);
        });
    }

  private:
    // body(begin, end) on pieces of [0, count) until none is left and all are done. A grain of 0: some.
    template <class Body>
    void stage(int64_t count, int64_t grain, Body body) {
        int64_t *const next = shared_.next + stage_, *const done = shared_.done + stage_;
        ++stage_;
        if (grain == 0) grain = 1 + count / (pieces * team_);
        int64_t mine = 0;
        for (;;) {
            const int64_t begin = __atomic_fetch_add(next, grain, __ATOMIC_RELAXED);
            if (begin >= count) break;
            const int64_t end = least(count, begin + grain);
            body(begin, end);
            mine += end - begin;
        }
        if (mine > 0) __atomic_fetch_add(done, mine, __ATOMIC_RELEASE);
        wait_until(done, count);
    }

    // out = x / rms(x) * weight.  Zhang and Sennrich, arXiv 1910.07467, equation 4.
    template <class T>
    void normalize(const float* x, const float* weight, int64_t n, T* out) const {
        F32 squares = broadcast(0.0f);
        for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const F32 value = access.get(x + i);
            squares = multiply_add(value, value, squares);
        });
        const float mean = reduce_add(squares) / static_cast<float>(n);
        const F32 scale = broadcast(1.0f / __builtin_sqrtf(mean + call_.epsilon));
        for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            access.put(out + i, access.get(x + i) * scale * access.get(weight + i));
        });
    }

    // low = A x
    void reduce(const DecodeLinear& linear, const bf16* x, float* low) {
        const int64_t in = linear.weight.in_features;
        for (int64_t r = 0; r < linear.rank; ++r) low[r] = dot(linear.lora_a + r * in, x, in);
    }

    // y[row] for begin <= row < end
    void multiply(const DecodeLinear& linear, const bf16* x, const float* low, int64_t begin, int64_t end,
                  float* y) {
        QuantizedRows<P, bf16> weight(linear.weight);
        const bool whole_chunks = linear.weight.in_features % chunk == 0;
        for (int64_t row = begin; row < end; ++row) {
            float sum = whole_chunks ? row_of_chunks(weight, row, x) : row_of_any(weight, row, x);
            if (linear.rank > 0) sum += dot(linear.lora_b + row * linear.rank, low, linear.rank);
            if (linear.bias != nullptr) sum += linear.bias[row];
            y[row] = sum;
        }
    }

    HALFBYTE_INLINE static float row_of_chunks(QuantizedRows<P, bf16>& weight, int64_t row, const bf16* x) {
        float sum;
        matvec_row<P, bf16, 1>(weight, row, x, 0, &sum);
        return sum;
    }

    static float row_of_any(QuantizedRows<P, bf16>& weight, int64_t row, const bf16* x) {
        const int64_t in = weight.weight_.in_features;
        alignas(64) bf16 buffer[row_room];
        F32 sums[4] = {};
        for (int64_t k = 0; k < in; k += strip) {
            const int64_t count = least(strip, in - k);
            accumulate(weight.row(row, k, count, buffer), x + k, count, sums);
        }
        return total(sums);
    }

    void project_queries_keys_values(const DecodeLayer& layer) {
        const DecodeLinear* const linears = layer.linears;  // query, key, value
        float* low[3] = {low_, low_ + call_.most_rank, low_ + 2 * call_.most_rank};
        for (int i = 0; i < 3; ++i) reduce(linears[i], x_, low[i]);
        stage(shared_.queries + 2 * shared_.cached, 0, [&](int64_t begin, int64_t end) {
            int64_t first = 0;
            for (int i = 0; i < 3; ++i) {
                const int64_t rows = linears[i].weight.out_features;
                const int64_t from = begin > first ? begin - first : 0, to = least(end - first, rows);
                multiply(linears[i], x_, low[i], from, to, shared_.projected + first);
                first += rows;
            }
        });
    }

    // out = x, normalized if there is a norm, rotated by the token's position, times scale.  Su et al., arXiv
    // 2104.09864, equation 34, with the pairs that Llama has: i and i + head_dim / 2.
    void rotate(const float* x, const float* norm, float scale, float* out) const {
        if (norm != nullptr) {
            normalize(x, norm, call_.head_dim, out);
            x = out;
        }
        const int64_t half = call_.head_dim / 2;
        for (int64_t i = 0; i < half; ++i) {
            const float first = x[i], second = x[half + i];
            out[i] = (first * call_.cos[i] - second * call_.sin[i]) * scale;
            out[half + i] = (second * call_.cos[half + i] + first * call_.sin[half + i]) * scale;
        }
    }

    void attend(int64_t layer, int64_t head) {
        const int64_t dim = call_.head_dim, position = call_.position, group = call_.heads / call_.kv_heads;
        const int64_t kv_head = head / group;
        const int64_t first = (layer * call_.kv_heads + kv_head) * call_.capacity * dim;
        bf16 *const keys = call_.keys + first, *const values = call_.values + first;
        const float* const new_key = shared_.projected + shared_.queries + kv_head * dim;
        const float* const new_value = new_key + shared_.cached;

        // Every head of a group needs the new key and value; one of them writes them to the cache, and the
        // others do not read them there, for they may come before it.
        const DecodeLayer& norms = call_.layers[layer];
        rotate(shared_.projected + head * dim, norms.query_norm, call_.attention_scale, query_);
        rotate(new_key, norms.key_norm, 1.0f, new_key_);
        bf16* const stored = head % group == 0 ? keys + position * dim : new_key_bits_;
        for_registers(dim, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            access.put(stored + i, access.get(new_key_ + i));
            if (head % group == 0) access.put(values + position * dim + i, access.get(new_value + i));
        });
        for (int64_t p = 0; p < position; ++p) scores_[p] = dot(keys + p * dim, query_, dim);
        scores_[position] = dot(stored, query_, dim);

        float greatest = scores_[0];
        for (int64_t p = 1; p <= position; ++p) greatest = scores_[p] > greatest ? scores_[p] : greatest;
        F32 sums = broadcast(0.0f);
        for_registers(position + 1, [&](int64_t p, auto access) HALFBYTE_LAMBDA {
            const F32 power = access.only(exp(access.get(scores_ + p) - broadcast(greatest)));
            access.put(scores_ + p, power);
            sums = sums + power;
        });
        const F32 scale = broadcast(1.0f / reduce_add(sums)), last = broadcast(scores_[position]);
        bf16* const mixed = shared_.mixed + head * dim;
        int64_t i = 0;
        for (; i + 4 * lanes <= dim; i += 4 * lanes) {
            F32 out[4];
            for (int v = 0; v < 4; ++v) out[v] = last * load(new_value + i + v * lanes);
            for (int64_t p = 0; p < position; ++p) {
                const F32 weight = broadcast(scores_[p]);
                for (int v = 0; v < 4; ++v)
                    out[v] = multiply_add(weight, load(values + p * dim + i + v * lanes), out[v]);
            }
            for (int v = 0; v < 4; ++v) store(mixed + i + v * lanes, out[v] * scale);
        }
        for_registers(dim - i, [&](int64_t j, auto access) HALFBYTE_LAMBDA {
            F32 out = last * access.get(new_value + i + j);
            for (int64_t p = 0; p < position; ++p)
                out = multiply_add(broadcast(scores_[p]), access.get(values + p * dim + i + j), out);
            access.put(mixed + i + j, out * scale);
        });
    }

    // residual += W x
    void add_projection(const DecodeLinear& linear, const bf16* x) {
        reduce(linear, x, low_);
        stage(call_.hidden, 0, [&](int64_t begin, int64_t end) {
            multiply(linear, x, low_, begin, end, shared_.sums);
            for (int64_t i = begin; i < end; ++i) shared_.residual[i] += shared_.sums[i];
        });
    }

    void gate_and_up(const DecodeLayer& layer) {
        const DecodeLinear &gate = layer.linears[decode_gate], &up = layer.linears[decode_up];
        float* const low_up = low_ + call_.most_rank;
        reduce(gate, x_, low_);
        reduce(up, x_, low_up);
        stage(call_.intermediate, 0, [&](int64_t begin, int64_t end) {
            multiply(gate, x_, low_, begin, end, shared_.gate);
            multiply(up, x_, low_up, begin, end, shared_.up);
            for_registers(end - begin, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
                const F32 g = access.get(shared_.gate + begin + i);
                access.put(shared_.gated + begin + i, g * sigmoid(g) * access.get(shared_.up + begin + i));
            });
        });
    }

    Shared& shared_;
    const DecodeToken& call_;
    const int team_;
    int64_t stage_ = 0;
    bf16* x_;
    float *low_, *scores_, *query_, *new_key_;
    bf16* new_key_bits_;
};

void run_worker(void* context, int member, int team) {
    Shared& shared = *static_cast<Shared*>(context);
    // The first member is the calling thread, whose buffer holds what is shared.
    float* memory = shared.private_to_first;
    if (member > 0)
        memory = static_cast<float*>(
            thread_buffer(static_cast<size_t>(Worker::floats(shared.call)) * sizeof(float)));
    Worker(shared, team, memory).run();
}

}  // namespace

void decode_token(const DecodeToken& call, int threads) {
    Shared shared(call);
    const size_t bytes = static_cast<size_t>(shared.floats() + Worker::floats(call)) * sizeof(float);
    float* const memory = static_cast<float*>(thread_buffer(bytes));
    memset(memory, 0, bytes);
    shared.lay_out(memory);
    for_registers(call.hidden, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
        access.put(shared.residual + i, access.get(call.embedding + i));
    });
    run_team(threads, run_worker, &shared);
}

}  // namespace halfbyte::HALFBYTE_ISA
