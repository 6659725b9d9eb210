// activation(gate) * up: SwiGLU and GeGLU (Shazeer, arXiv 2002.05202), forward and backward. The backward
// computes the activation again: that costs less than reading it back would.

#include "../simd/math.hpp"
#include "../threads.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t values_per_grain = 8192;

// Each has value(x) and derivative(x) as one call, since they share most of their work.
struct ValueAndSlope {
    F32 value, slope;
};

struct Silu {  // x * sigmoid(x)
    HALFBYTE_INLINE ValueAndSlope operator()(F32 x) const {
        const F32 one = broadcast(1.0f), s = sigmoid(x);
        return {x * s, s * multiply_add(x, one - s, one)};
    }
};

struct GeluTanh {  // x/2 * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3)
    HALFBYTE_INLINE ValueAndSlope operator()(F32 x) const {
        const F32 one = broadcast(1.0f), twice_root = broadcast(1.5957691216f), square = x * x;
        const F32 s = sigmoid(twice_root * x * multiply_add(broadcast(0.044715f), square, one));
        const F32 slope = twice_root * multiply_add(broadcast(3 * 0.044715f), square, one);
        return {x * s, multiply_add(x * s * (one - s), slope, s)};
    }
};

struct Gelu {  // x * Phi(x), Phi the normal distribution
    HALFBYTE_INLINE ValueAndSlope operator()(F32 x) const {
        const F32 half = broadcast(0.5f);
        const F32 phi = multiply_add(half, erf(x * broadcast(0.70710678f)), half);
        const F32 density = broadcast(0.39894228f) * exp(-half * x * x);
        return {x * phi, multiply_add(x, density, phi)};
    }
};

template <class T, class Function>
void gated_rows(void* context, int64_t begin, int64_t end) {
    const GatedForward& call = *static_cast<const GatedForward*>(context);
    const Function function;
    for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(call.gate) + row * call.gate_stride;
        const T* up = static_cast<const T*>(call.up) + row * call.up_stride;
        T* out = static_cast<T*>(call.out) + row * call.out_stride;
        for_registers(call.columns, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            access.put(out + i, function(access.get(gate + i)).value * access.get(up + i));
        });
    }
}

template <class T, class Function>
void gated_rows_backward(void* context, int64_t begin, int64_t end) {
    const GatedBackward& call = *static_cast<const GatedBackward*>(context);
    const Function function;
    for (int64_t row = begin; row < end; ++row) {
        const T* grad = static_cast<const T*>(call.grad) + row * call.columns;
        const T* gate = static_cast<const T*>(call.gate) + row * call.gate_stride;
        const T* up = static_cast<const T*>(call.up) + row * call.up_stride;
        T* grad_gate = static_cast<T*>(call.grad_gate) + row * call.grad_stride;
        T* grad_up = static_cast<T*>(call.grad_up) + row * call.grad_stride;
        for_registers(call.columns, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
            const ValueAndSlope f = function(access.get(gate + i));
            const F32 g = access.get(grad + i);
            access.put(grad_gate + i, g * access.get(up + i) * f.slope);
            access.put(grad_up + i, g * f.value);
        });
    }
}

using Body = void (*)(void*, int64_t, int64_t);

template <class T>
Body forward_body(Activation activation) {
    if (activation == Activation::silu) return gated_rows<T, Silu>;
    return activation == Activation::gelu ? gated_rows<T, Gelu> : gated_rows<T, GeluTanh>;
}

template <class T>
Body backward_body(Activation activation) {
    if (activation == Activation::silu) return gated_rows_backward<T, Silu>;
    return activation == Activation::gelu ? gated_rows_backward<T, Gelu> : gated_rows_backward<T, GeluTanh>;
}

HALFBYTE_INLINE int64_t rows_per_grain(int64_t columns) {
    return columns < values_per_grain ? values_per_grain / (columns > 0 ? columns : 1) : 1;
}

}  // namespace

void gated_forward(const GatedForward& call, int threads) {
    Body body = forward_body<float>(call.activation);
    if (call.dtype == DType::bf16) body = forward_body<bf16>(call.activation);
    if (call.dtype == DType::f16) body = forward_body<f16>(call.activation);
    parallel_for(call.rows, rows_per_grain(call.columns), threads, body, const_cast<GatedForward*>(&call));
}

void gated_backward(const GatedBackward& call, int threads) {
    Body body = backward_body<float>(call.activation);
    if (call.dtype == DType::bf16) body = backward_body<bf16>(call.activation);
    if (call.dtype == DType::f16) body = backward_body<f16>(call.activation);
    parallel_for(call.rows, rows_per_grain(call.columns), threads, body, const_cast<GatedBackward*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
