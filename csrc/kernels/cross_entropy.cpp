// Cross-entropy of rows of logits, and its gradient in their place. A row is read twice: once for the sum of
// its exponentials (with the running maximum of online softmax, Milakov and Gimelshein, arXiv 1805.02867) and
// once, from cache, for the gradient.

#include "../simd/math.hpp"
#include "../threads.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// Logits that are scaled and capped at a time; as float32 they stay in the first-level cache.
constexpr int64_t block = 1024;

template <bool capped>
struct Transform {
    float scale, softcap;

    HALFBYTE_INLINE F32 operator()(F32 logits) const {
        const F32 x = logits * broadcast(scale);
        return capped ? broadcast(softcap) * tanh(x * broadcast(1 / softcap)) : x;
    }
    HALFBYTE_INLINE F32 derivative(F32 x) const {
        if (!capped) return broadcast(scale);
        const F32 t = x * broadcast(1 / softcap);
        return broadcast(scale) * (broadcast(1.0f) - t * t);
    }
};

HALFBYTE_INLINE float first_lane(F32 v) { return v[0]; }

// The maximum and the sum of exp(x - maximum).
template <class T, bool capped>
HALFBYTE_INLINE void reduce_row(const T* logits, int64_t n, Transform<capped> transform, float* maximum,
                                float* sum) {
    const float lowest = -0x1.fffffep127f;
    float x[block];
    *maximum = lowest;
    *sum = 0;
    for (int64_t start = 0; start < n; start += block) {
        const int64_t count = n - start < block ? n - start : block;
        F32 block_maximum = broadcast(lowest);
        int64_t i = 0;
        for (; i + lanes <= count; i += lanes) {
            const F32 v = transform(load(logits + start + i));
            store(x + i, v);
            block_maximum = max(block_maximum, v);
        }
        if (i < count) {
            store(x + i, transform(load_first(logits + start + i, count - i)));
            for (int64_t j = count; j < i + lanes; ++j) x[j] = -__builtin_inff();
            block_maximum = max(block_maximum, load(x + i));
        }
        const float greater = reduce_max(block_maximum);
        if (greater > *maximum) {
            *sum *= first_lane(exp(broadcast(*maximum - greater)));
            *maximum = greater;
        }
        const F32 shift = broadcast(*maximum);
        F32 sums = broadcast(0.0f);
        for (i = 0; i < count; i += lanes) sums = sums + exp(load(x + i) - shift);
        *sum += reduce_add(sums);
    }
}

template <class T, bool capped>
void cross_entropy_rows(void* context, int64_t begin, int64_t end) {
    const CrossEntropy& call = *static_cast<const CrossEntropy*>(context);
    const Transform<capped> transform{call.scale, call.softcap};
    for (int64_t row = begin; row < end; ++row) {
        T* logits = static_cast<T*>(call.logits) + row * call.vocabulary;
        T* target = logits + call.targets[row];
        const F32 x_target = transform(load_first(target, 1));
        float maximum, sum;
        reduce_row(logits, call.vocabulary, transform, &maximum, &sum);
        const float log_sum = maximum + __builtin_logf(sum);
        call.losses[row] = log_sum - first_lane(x_target);
        if (!call.gradient) continue;

        const F32 shift = broadcast(maximum), norm = broadcast(1 / sum);
        for_registers(call.vocabulary, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const F32 x = transform(access.get(logits + i));
            access.put(logits + i, exp(x - shift) * norm * transform.derivative(x));
        });
        // The target's own is computed apart: from the rounded probability, 1 - p would lose its digits.
        const F32 p = exp(x_target - shift) * norm;
        store_first(target, 1, (p - broadcast(1.0f)) * transform.derivative(x_target));
    }
}

}  // namespace

void cross_entropy(const CrossEntropy& call, int threads) {
    const bool capped = call.softcap != 0;
    void (*body)(void*, int64_t, int64_t) =
        capped ? cross_entropy_rows<float, true> : cross_entropy_rows<float, false>;
    if (call.dtype == DType::bf16)
        body = capped ? cross_entropy_rows<bf16, true> : cross_entropy_rows<bf16, false>;
    if (call.dtype == DType::f16)
        body = capped ? cross_entropy_rows<f16, true> : cross_entropy_rows<f16, false>;
    parallel_for(call.rows, 1, threads, body, const_cast<CrossEntropy*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
