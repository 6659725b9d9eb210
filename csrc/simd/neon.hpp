// aarch64's baseline. Contract: isa.hpp.
#pragma once

#include <arm_neon.h>

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int lanes = 4;
using F32 = float32x4_t;
using I32 = int32x4_t;

HALFBYTE_INLINE F32 load(const float* p) { return vld1q_f32(p); }
HALFBYTE_INLINE F32 load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
HALFBYTE_INLINE F32 load(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
HALFBYTE_INLINE void store(float* p, F32 v) { vst1q_f32(p, v); }
HALFBYTE_INLINE F32 broadcast(float x) { return vdupq_n_f32(x); }
HALFBYTE_INLINE F32 multiply(F32 a, F32 b) { return vmulq_f32(a, b); }
HALFBYTE_INLINE F32 multiply_add(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
HALFBYTE_INLINE F32 sqrt(F32 v) { return vsqrtq_f32(v); }
HALFBYTE_INLINE F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
HALFBYTE_INLINE float reduce_add(F32 v) { return vaddvq_f32(v); }
HALFBYTE_INLINE float reduce_max(F32 v) { return vmaxvq_f32(v); }

HALFBYTE_INLINE I32 zero_bits() { return vdupq_n_s32(0); }
HALFBYTE_INLINE I32 magnitude_bits(F32 v) {
    return vandq_s32(vreinterpretq_s32_f32(v), vdupq_n_s32(0x7fffffff));
}
HALFBYTE_INLINE I32 max(I32 a, I32 b) { return vmaxq_s32(a, b); }
HALFBYTE_INLINE int32_t reduce_max(I32 v) { return vmaxvq_s32(v); }

class Nearest16 {
  public:
    explicit Nearest16(const Codebook16& book) : order_(vld1q_u8(book.code)) {
        for (int t = 0; t < 15; ++t) thresholds_[t] = vdupq_n_f32(book.thresholds[t]);
    }

    HALFBYTE_INLINE I32 rank(F32 v) const {
        uint32x4_t below = vdupq_n_u32(0);
        for (int t = 0; t < 15; ++t) below = vsubq_u32(below, vcgtq_f32(v, thresholds_[t]));
        return vreinterpretq_s32_u32(below);
    }

    HALFBYTE_INLINE void pack32(const I32* ranks, uint8_t* out) const {
        const uint8x16_t a = vqtbl1q_u8(order_, narrow(ranks)), b = vqtbl1q_u8(order_, narrow(ranks + 4));
        vst1q_u8(out, vorrq_u8(vshlq_n_u8(vuzp1q_u8(a, b), 4), vuzp2q_u8(a, b)));
    }

  private:
    HALFBYTE_INLINE static uint8x16_t narrow(const I32* r) {
        const int16x8_t a = vcombine_s16(vmovn_s32(r[0]), vmovn_s32(r[1]));
        const int16x8_t b = vcombine_s16(vmovn_s32(r[2]), vmovn_s32(r[3]));
        return vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
    }

    F32 thresholds_[15];
    uint8x16_t order_;
};

HALFBYTE_INLINE uint16x4_t round_to(F32 v, bf16) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    // A NaN's bits could carry into its sign.
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
}
HALFBYTE_INLINE uint16x4_t round_to(F32 v, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
template <class T>
HALFBYTE_INLINE void store(T* p, F32 v) {  // bf16 and f16
    vst1_u16(reinterpret_cast<uint16_t*>(p), round_to(v, T{}));
}

// Sixteen bytes -> their high and low nibbles interleaved, in the order of the values.
HALFBYTE_INLINE uint8x16x2_t codes_of(const uint8_t* packed) {
    const uint8x16_t bytes = vld1q_u8(packed);
    return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
}

template <class T>
class Table16 {  // bf16 and f16: byte lookups on the entries' low and high bytes; the store interleaves them
  public:
    explicit Table16(const float* codebook) {
        for (int i = 0; i < 4; ++i) codebook_[i] = vld1q_f32(codebook + 4 * i);
    }

    HALFBYTE_INLINE void scale(float absmax) {
        uint16x4_t q[4];
        for (int i = 0; i < 4; ++i) q[i] = round_to(vmulq_n_f32(codebook_[i], absmax), T{});
        const uint8x16_t a = vreinterpretq_u8_u16(vcombine_u16(q[0], q[1]));
        const uint8x16_t b = vreinterpretq_u8_u16(vcombine_u16(q[2], q[3]));
        low_ = vuzp1q_u8(a, b);
        high_ = vuzp2q_u8(a, b);
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, T* out) const {
        const uint8x16x2_t codes = codes_of(packed);
        uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
        for (int i = 0; i < 2; ++i) {
            const uint8x16x2_t planes = {{vqtbl1q_u8(low_, codes.val[i]), vqtbl1q_u8(high_, codes.val[i])}};
            vst2q_u8(bytes + 32 * i, planes);
        }
    }

  private:
    F32 codebook_[4];
    uint8x16_t low_ = vdupq_n_u8(0), high_ = vdupq_n_u8(0);
};

template <>
class Table16<float> {
  public:
    explicit Table16(const float* codebook) {
        for (int i = 0; i < 4; ++i) codebook_[i] = vld1q_f32(codebook + 4 * i);
    }

    HALFBYTE_INLINE void scale(float absmax) {
        for (int i = 0; i < 4; ++i) table_.val[i] = vreinterpretq_u8_f32(vmulq_n_f32(codebook_[i], absmax));
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, float* out) const {
        // A float32 is the four bytes from 4 * code of the sixty-four that the table is.
        const uint8x16x2_t codes = codes_of(packed);
        uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
        for (int i = 0; i < 2; ++i) {
            const uint8x16_t first = vshlq_n_u8(codes.val[i], 2);
            uint8x16x4_t planes;
            for (int b = 0; b < 4; ++b) planes.val[b] = vqtbl4q_u8(table_, vorrq_u8(first, vdupq_n_u8(b)));
            vst4q_u8(bytes + 64 * i, planes);
        }
    }

  private:
    F32 codebook_[4];
    uint8x16x4_t table_ = {{vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)}};
};

HALFBYTE_INLINE F32 pick(const float* t, int a, int b, int c, int d) {
    F32 v = vdupq_n_f32(t[a]);
    v = vsetq_lane_f32(t[b], v, 1);
    v = vsetq_lane_f32(t[c], v, 2);
    return vsetq_lane_f32(t[d], v, 3);
}
HALFBYTE_INLINE I32 nearest256(const float* thresholds, F32 v) {
    I32 rank = vdupq_n_s32(0);
    for (int size = 128; size > 0; size /= 2) {
        const F32 t = pick(thresholds + size - 1, vgetq_lane_s32(rank, 0), vgetq_lane_s32(rank, 1),
                           vgetq_lane_s32(rank, 2), vgetq_lane_s32(rank, 3));
        const I32 above = vreinterpretq_s32_u32(vcgtq_f32(v, t));
        rank = vaddq_s32(rank, vandq_s32(above, vdupq_n_s32(size)));
    }
    return rank;
}
HALFBYTE_INLINE void store_codes(uint8_t* p, I32 codes) {
    p[0] = static_cast<uint8_t>(vgetq_lane_s32(codes, 0));
    p[1] = static_cast<uint8_t>(vgetq_lane_s32(codes, 1));
    p[2] = static_cast<uint8_t>(vgetq_lane_s32(codes, 2));
    p[3] = static_cast<uint8_t>(vgetq_lane_s32(codes, 3));
}
HALFBYTE_INLINE F32 lookup256(const float* table, const uint8_t* codes) {
    return pick(table, codes[0], codes[1], codes[2], codes[3]);
}
HALFBYTE_INLINE F32 gather(const float* table, I32 index) {
    return pick(table, vgetq_lane_s32(index, 0), vgetq_lane_s32(index, 1), vgetq_lane_s32(index, 2),
                vgetq_lane_s32(index, 3));
}
HALFBYTE_INLINE I32 gather(const int32_t* table, I32 index) {
    return vreinterpretq_s32_f32(gather(reinterpret_cast<const float*>(table), index));
}

constexpr int registers = 32;

HALFBYTE_INLINE F32 zero() { return vdupq_n_f32(0.0f); }
HALFBYTE_INLINE F32 broadcast(const float* p) { return vld1q_dup_f32(p); }

HALFBYTE_INLINE void transpose(F32* r) {
    const float32x4x2_t a = vzipq_f32(r[0], r[2]), b = vzipq_f32(r[1], r[3]);
    const float32x4x2_t low = vzipq_f32(a.val[0], b.val[0]), high = vzipq_f32(a.val[1], b.val[1]);
    r[0] = low.val[0];
    r[1] = low.val[1];
    r[2] = high.val[0];
    r[3] = high.val[1];
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
