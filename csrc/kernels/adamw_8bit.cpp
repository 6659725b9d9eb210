// AdamW with moments of 8 bits, in one pass over memory: a block's moments are decoded, updated and used in
// float32, kept in the first-level cache until their new absmax is known, and encoded.

#include "adamw.hpp"

#include "blocks.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int64_t block = adamw_8bit_block;
static_assert(piece % block == 0, "a block lies within one piece");

// The codes nearest to values of [-1, 1]: all thresholds below the value's cell, and the one inside if it is
// below the value too.
HALFBYTE_INLINE I32 nearest_in(const DynamicMap& map, F32 x) {
    const Bits bits = (Bits)x;
    const Bits leading = ((bits & 0x7fffffff) >> DynamicMap::shift) - DynamicMap::first_cell;
    const Bits cell = leading > 0 ? leading : Bits{};
    const Bits second_half = (bits >> 31) & DynamicMap::cells;
    const I32 below = gather(map.below, (I32)(cell + second_half));
    const Bits above = (Bits)(x > gather(map.thresholds, below));
    return (I32)((Bits)below - above);  // a comparison that holds is -1
}

// One moment of one block.
struct Moment {
    uint8_t* codes;
    float* absmax;
    const DynamicMap* map;
};

// NaN for a block that holds a NaN or an infinity: so do all of its values become, as they would without
// codes.
HALFBYTE_INLINE void encode(const float* values, const Moment& to) {
    const int32_t bits = absmax_bits(values, block);
    const bool finite = bits < infinity_bits;
    const float absmax = finite ? float_from_bits(bits) : __builtin_nanf("");
    *to.absmax = absmax;
    const F32 scale = broadcast(reciprocal(absmax));
    for (int64_t i = 0; i < block; i += lanes) {
        const F32 x = finite ? load(values + i) * scale : broadcast(0.0f);
        store_codes(to.codes + i, nearest_in(*to.map, x));
    }
}

HALFBYTE_INLINE void step_block(float* parameter, const float* grad, const Moment& first,
                                const Moment& second, const AdamWNumbers& numbers) {
    float m[block], v[block];
    const F32 m_scale = broadcast(*first.absmax), v_scale = broadcast(*second.absmax);
    for (int64_t i = 0; i < block; i += lanes) {
        const AdamWRegister before = {load(parameter + i),
                                      lookup256(first.map->entries, first.codes + i) * m_scale,
                                      lookup256(second.map->entries, second.codes + i) * v_scale};
        const AdamWRegister after = stepped(before, load(grad + i), numbers);
        store(parameter + i, after.parameter);
        store(m + i, after.m);
        store(v + i, after.v);
    }
    encode(m, first);
    encode(v, second);
}

// The last block of a tensor, completed with zeros that no absmax shows.
HALFBYTE_INLINE void step_short_block(float* parameter, const float* grad, const Moment& first,
                                      const Moment& second, int64_t count, const AdamWNumbers& numbers) {
    float parameters[block] = {}, grads[block] = {};
    uint8_t m[block], v[block];
    const size_t n = static_cast<size_t>(count);
    memset(m, first.map->zero, block);
    memset(v, second.map->zero, block);
    memcpy(parameters, parameter, n * sizeof(float));
    memcpy(grads, grad, n * sizeof(float));
    memcpy(m, first.codes, n);
    memcpy(v, second.codes, n);
    step_block(parameters, grads, {m, first.absmax, first.map}, {v, second.absmax, second.map}, numbers);
    memcpy(parameter, parameters, n * sizeof(float));
    memcpy(first.codes, m, n);
    memcpy(second.codes, v, n);
}

HALFBYTE_INLINE void step_piece(const AdamW8bitStep& call, int64_t tensor, int64_t start, int64_t count) {
    for (int64_t done = 0; done < count; done += block) {
        const int64_t at = start + done, left = count - done;
        float* parameter = call.parameters[tensor] + at;
        const float* grad = call.grads[tensor] + at;
        const Moment first = {call.exp_avgs[tensor] + at, call.exp_avg_absmaxs[tensor] + at / block,
                              call.exp_avg_map};
        const Moment second = {call.exp_avg_sqs[tensor] + at, call.exp_avg_sq_absmaxs[tensor] + at / block,
                               call.exp_avg_sq_map};
        if (left >= block)
            step_block(parameter, grad, first, second, call.numbers);
        else
            step_short_block(parameter, grad, first, second, left, call.numbers);
    }
}

void step_pieces(void* context, int64_t begin, int64_t end) {
    for_pieces(*static_cast<const AdamW8bitStep*>(context), begin, end, step_piece);
}

}  // namespace

void adamw_8bit_step(const AdamW8bitStep& call, int threads) {
    parallel_for(all_pieces(call), 4, threads, step_pieces, const_cast<AdamW8bitStep*>(&call));
}

}  // namespace halfbyte::HALFBYTE_ISA
