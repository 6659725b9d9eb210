// What both kernels of AdamW share: a register's arithmetic, and how many tensors become equal pieces. The
// pieces are shared out, so that four hundred small adapters keep all threads busy; a value's arithmetic is
// its own, or its block's, and blocks divide pieces, so the cut never shows.
#pragma once

#include "../simd/math.hpp"
#include "../threads.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t piece = 8192;

// A register of values: the parameter's, its moments' and its gradient's.
struct AdamWRegister {
    F32 parameter, m, v;
};

// In the order of torch's own operators (lerp, mul, addcmul, sqrt, div, add, mul, addcdiv): with fused
// multiply-add the moments are theirs to the bit.
HALFBYTE_INLINE AdamWRegister stepped(const AdamWRegister& before, F32 g, const AdamWNumbers& numbers) {
    // Interpolated from the end that is nearer, so that beta1 = 0 gives the gradient itself.
    const bool near = numbers.one_minus_beta1 < 0.5f;
    const float weight = near ? numbers.one_minus_beta1 : numbers.one_minus_beta1 - 1;
    const F32 m = multiply_add(broadcast(weight), g - before.m, near ? before.m : g);
    const F32 decayed = before.v * broadcast(numbers.beta2);
    const F32 v = multiply_add(broadcast(numbers.one_minus_beta2) * g, g, decayed);
    const F32 denominator = sqrt(v) / broadcast(numbers.root_correction2) + broadcast(numbers.eps);
    const F32 kept = before.parameter * broadcast(numbers.keep);
    return {multiply_add(broadcast(-numbers.step_size), m / denominator, kept), m, v};
}

HALFBYTE_INLINE int64_t pieces_of(int64_t size) { return (size + piece - 1) / piece; }

// step_piece(call, tensor, start, count) for each of the pieces [begin, end) of all tensors.
template <class Call, class StepPiece>
HALFBYTE_INLINE void for_pieces(const Call& call, int64_t begin, int64_t end, StepPiece step_piece) {
    int64_t first = 0;  // of the tensor's pieces
    for (int64_t tensor = 0; tensor < call.tensors && first < end; ++tensor) {
        const int64_t count = pieces_of(call.sizes[tensor]);
        const int64_t from = begin > first ? begin - first : 0,
                      to = end - first < count ? end - first : count;
        for (int64_t i = from; i < to; ++i) {
            const int64_t left = call.sizes[tensor] - i * piece;
            step_piece(call, tensor, i * piece, left < piece ? left : piece);
        }
        first += count;
    }
}

template <class Call>
HALFBYTE_INLINE int64_t all_pieces(const Call& call) {
    int64_t pieces = 0;
    for (int64_t tensor = 0; tensor < call.tensors; ++tensor) pieces += pieces_of(call.sizes[tensor]);
    return pieces;
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
