// Root-mean-square and layer normalization, forward, and backward to the input. A row is read from memory
// once: its second pass finds it in cache.

#include "../simd/math.hpp"
#include "../threads.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t values_per_grain = 16384;

template <class T, bool centered>
void normalize_rows(void* context, int64_t begin, int64_t end) {
    const NormForward& call = *static_cast<const NormForward*>(context);
    const int64_t n = call.columns;
    const T* weight = static_cast<const T*>(call.weight);
    const T* bias = static_cast<const T*>(call.bias);
    const F32 offset = broadcast(call.offset), zero = broadcast(0.0f);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(call.x) + row * n;
        T* y = static_cast<T*>(call.y) + row * n;
        float center = 0;
        if (centered) {
            F32 sum = zero;
            for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA { sum = sum + access.get(x + i); });
            center = reduce_add(sum) / static_cast<float>(n);
            call.mean[row] = center;
        }
        const F32 mean = broadcast(center);
        F32 squares = zero;
        for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const F32 d = centered ? access.only(access.get(x + i) - mean) : access.get(x + i);
            squares = multiply_add(d, d, squares);
        });
        const float rstd = 1 / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(n) + call.eps);
        call.rstd[row] = rstd;
        const F32 r = broadcast(rstd);
        for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const F32 scaled = (access.get(x + i) - mean) * r * (offset + access.get(weight + i));
            access.put(y + i, bias ? scaled + access.get(bias + i) : scaled);
        });
    }
}

// With g = grad * (offset + weight) and z = (x - mean) * rstd:
//   grad_x = rstd * (g - mean(g) - z * mean(g * z)), where mean(g) is absent if nothing was centered.
template <class T, bool centered>
void normalize_rows_backward(void* context, int64_t begin, int64_t end) {
    const NormBackward& call = *static_cast<const NormBackward*>(context);
    const int64_t n = call.columns;
    const T* weight = static_cast<const T*>(call.weight);
    const F32 offset = broadcast(call.offset), zero = broadcast(0.0f);
    for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(call.x) + row * n;
        const T* grad = static_cast<const T*>(call.grad) + row * n;
        T* grad_x = static_cast<T*>(call.grad_x) + row * n;
        const F32 r = broadcast(call.rstd[row]), mean = centered ? broadcast(call.mean[row]) : zero;
        F32 sum = zero, product = zero;
        for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const F32 g = access.get(grad + i) * (offset + access.get(weight + i));
            if (centered) sum = sum + g;
            product = multiply_add(g, (access.get(x + i) - mean) * r, product);
        });
        const F32 mean_g = broadcast(centered ? reduce_add(sum) / static_cast<float>(n) : 0.0f);
        const F32 mean_gz = broadcast(reduce_add(product) / static_cast<float>(n));
        for_registers(n, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const F32 g = access.get(grad + i) * (offset + access.get(weight + i));
            const F32 z = (access.get(x + i) - mean) * r;
            access.put(grad_x + i, (g - mean_g - z * mean_gz) * r);
        });
    }
}

HALFBYTE_INLINE int64_t rows_per_grain(int64_t columns) {
    return columns < values_per_grain ? values_per_grain / (columns > 0 ? columns : 1) : 1;
}

}  // namespace

void norm_forward(const NormForward& call, int threads) {
    const bool centered = call.mean != nullptr;
    void (*body)(void*, int64_t, int64_t) =
        centered ? normalize_rows<float, true> : normalize_rows<float, false>;
    if (call.dtype == DType::bf16) body = centered ? normalize_rows<bf16, true> : normalize_rows<bf16, false>;
    if (call.dtype == DType::f16) body = centered ? normalize_rows<f16, true> : normalize_rows<f16, false>;
    parallel_for(call.rows, rows_per_grain(call.columns), threads, body, const_cast<NormForward*>(&call));
}

void norm_backward(const NormBackward& call, int threads) {
    const bool centered = call.mean != nullptr;
    void (*body)(void*, int64_t, int64_t) =
        centered ? normalize_rows_backward<float, true> : normalize_rows_backward<float, false>;
    if (call.dtype == DType::bf16)
        body = centered ? normalize_rows_backward<bf16, true> : normalize_rows_backward<bf16, false>;
    if (call.dtype == DType::f16)
        body = centered ? normalize_rows_backward<f16, true> : normalize_rows_backward<f16, false>;
    parallel_for(call.rows, rows_per_grain(call.columns), threads, body, const_cast<NormBackward*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
