// Rotary position embedding on strided heads. A position is the task: its row of the tables serves every
// head.

#include "../simd/math.hpp"
#include "../threads.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t values_per_grain = 16384;

template <class T>
void rotate_positions(void* context, int64_t begin, int64_t end) {
    const Rotary& call = *static_cast<const Rotary*>(context);
    const int64_t half = call.rotary_dim / 2;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t batch = task / call.length, position = task % call.length;
        const int64_t row = batch * call.table_stride[0] + position * call.table_stride[1];
        const T* cos = static_cast<const T*>(call.cos) + row;
        const T* sin = static_cast<const T*>(call.sin) + row;
        const T* x = static_cast<const T*>(call.x) + batch * call.x_stride[0] + position * call.x_stride[2];
        T* y = static_cast<T*>(call.y) + batch * call.y_stride[0] + position * call.y_stride[2];
        for (int64_t head = 0; head < call.heads; ++head, x += call.x_stride[1], y += call.y_stride[1]) {
            for_registers(half, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
                const F32 a = access.get(x + i), b = access.get(x + half + i);
                const F32 cos_a = access.get(cos + i), cos_b = access.get(cos + half + i);
                const F32 sin_a = access.get(sin + i), sin_b = access.get(sin + half + i);
                const F32 first =
                    call.backward ? multiply_add(b, sin_b, a * cos_a) : multiply_add(-b, sin_a, a * cos_a);
                const F32 second =
                    call.backward ? multiply_add(-a, sin_a, b * cos_b) : multiply_add(a, sin_b, b * cos_b);
                access.put(y + i, first);
                access.put(y + half + i, second);
            });
            if (call.rotary_dim < call.head_dim)
                memcpy(y + call.rotary_dim, x + call.rotary_dim,
                       static_cast<size_t>(call.head_dim - call.rotary_dim) * sizeof(T));
        }
    }
}

}  // namespace

void rotary(const Rotary& call, int threads) {
    void (*body)(void*, int64_t, int64_t) = rotate_positions<float>;
    if (call.dtype == DType::bf16) body = rotate_positions<bf16>;
    if (call.dtype == DType::f16) body = rotate_positions<f16>;
    const int64_t values = call.heads * call.head_dim;
    const int64_t grain = values < values_per_grain ? values_per_grain / (values > 0 ? values : 1) : 1;
    parallel_for(call.batch * call.length, grain, threads, body, const_cast<Rotary*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
