// AdamW on every parameter in one call. The tensors are cut into pieces and the pieces are shared out, so
// that four hundred small adapters keep all threads busy; each value's arithmetic is its own, so the cut
// never shows.

#include "../simd/math.hpp"
#include "../threads.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t piece = 8192;

HALFBYTE_INLINE int64_t pieces_of(int64_t size) { return (size + piece - 1) / piece; }

// In the order of torch's own operators (lerp, mul, addcmul, sqrt, div, add, mul, addcdiv): with fused
// multiply-add the moments are theirs to the bit. roundings.
HALFBYTE_INLINE void step_piece(const AdamWStep& call, int64_t tensor, int64_t start) {
    float* parameter = call.parameters[tensor] + start;
    const float* grad = call.grads[tensor] + start;
    float* exp_avg = call.exp_avgs[tensor] + start;
    float* exp_avg_sq = call.exp_avg_sqs[tensor] + start;
    const int64_t left = call.sizes[tensor] - start;
    // Interpolated from the end that is nearer, so that beta1 = 0 gives the gradient itself.
    const bool near = call.one_minus_beta1 < 0.5f;
    const float weight = near ? call.one_minus_beta1 : call.one_minus_beta1 - 1;
    for_registers(left < piece ? left : piece, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
        const F32 g = access.get(grad + i), m_before = access.get(exp_avg + i);
        const F32 m = multiply_add(broadcast(weight), g - m_before, near ? m_before : g);
        const F32 decayed = access.get(exp_avg_sq + i) * broadcast(call.beta2);
        const F32 v = multiply_add(broadcast(call.one_minus_beta2) * g, g, decayed);
        const F32 denominator = sqrt(v) / broadcast(call.root_correction2) + broadcast(call.eps);
        const F32 kept = access.get(parameter + i) * broadcast(call.keep);
        access.put(exp_avg + i, m);
        access.put(exp_avg_sq + i, v);
        access.put(parameter + i, multiply_add(broadcast(-call.step_size), m / denominator, kept));
    });
}

void step_pieces(void* context, int64_t begin, int64_t end) {
    const AdamWStep& call = *static_cast<const AdamWStep*>(context);
    int64_t first = 0;  // of the tensor's pieces
    for (int64_t tensor = 0; tensor < call.tensors && first < end; ++tensor) {
        const int64_t count = pieces_of(call.sizes[tensor]);
        const int64_t from = begin > first ? begin - first : 0,
                      to = end - first < count ? end - first : count;
        for (int64_t i = from; i < to; ++i) step_piece(call, tensor, i * piece);
        first += count;
    }
}

}  // namespace

void adamw_step(const AdamWStep& call, int threads) {
    int64_t pieces = 0;
    for (int64_t tensor = 0; tensor < call.tensors; ++tensor) pieces += pieces_of(call.sizes[tensor]);
    parallel_for(pieces, 4, threads, step_pieces, const_cast<AdamWStep*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
