// AdamW on every parameter in one call.

#include "adamw.hpp"

#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

HALFBYTE_INLINE void step_piece(const AdamWStep& call, int64_t tensor, int64_t start, int64_t count) {
    float* parameter = call.parameters[tensor] + start;
    const float* grad = call.grads[tensor] + start;
    float* exp_avg = call.exp_avgs[tensor] + start;
    float* exp_avg_sq = call.exp_avg_sqs[tensor] + start;
    const AdamWNumbers numbers = call.numbers;
    for_registers(count, [&](int64_t i, auto access) HALFBYTE_LAMBDA {
        const AdamWRegister before = {access.get(parameter + i), access.get(exp_avg + i),
                                      access.get(exp_avg_sq + i)};
        const AdamWRegister after = stepped(before, access.get(grad + i), numbers);
        access.put(exp_avg + i, after.m);
        access.put(exp_avg_sq + i, after.v);
        access.put(parameter + i, after.parameter);
    });
}

void step_pieces(void* context, int64_t begin, int64_t end) {
    for_pieces(*static_cast<const AdamWStep*>(context), begin, end, step_piece);
}

}  // namespace

void adamw_step(const AdamWStep& call, int threads) {
    parallel_for(all_pieces(call), 4, threads, step_pieces, const_cast<AdamWStep*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
