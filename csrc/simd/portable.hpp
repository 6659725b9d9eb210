// Any machine with a compiler that has GCC's vector types: four lanes, which every baseline that matters has
// in hardware (and which never collapse to scalars, as wider vectors than the hardware's do). Contract:
// isa.hpp.
#pragma once

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int lanes = 4;
typedef float F32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));

HALFBYTE_INLINE F32 load(const float* p) {
    F32 v;
    memcpy(&v, p, sizeof v);
    return v;
}
HALFBYTE_INLINE F32 load(const bf16* p) {
    return (F32)(I32{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
HALFBYTE_INLINE F32 broadcast(float x) { return F32{x, x, x, x}; }
HALFBYTE_INLINE I32 broadcast(int32_t x) { return I32{x, x, x, x}; }
HALFBYTE_INLINE F32 load(const f16* p) {
    const I32 bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    const I32 magnitude = bits & broadcast(0x7fff);
    // Moved into float32's fields the exponent is too small by 112, for denormals too.
    const I32 finite = (I32)((F32)(magnitude << 13) * broadcast(0x1p112f));
    const I32 special = (magnitude >= broadcast(0x7c00)) & broadcast(0x7f800000);
    return (F32)(finite | special | (bits & broadcast(0x8000)) << 16);
}
HALFBYTE_INLINE void store(float* p, F32 v) { memcpy(p, &v, sizeof v); }
HALFBYTE_INLINE F32 multiply(F32 a, F32 b) { return a * b; }
HALFBYTE_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
    return a * b + c;
}  // rounds twice: a baseline may lack the instruction
HALFBYTE_INLINE F32 sqrt(F32 v) {
    return F32{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]), __builtin_sqrtf(v[3])};
}
HALFBYTE_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
HALFBYTE_INLINE float reduce_add(F32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
HALFBYTE_INLINE float reduce_max(F32 v) {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

HALFBYTE_INLINE I32 zero_bits() { return I32{}; }
HALFBYTE_INLINE I32 magnitude_bits(F32 v) { return (I32)v & broadcast(0x7fffffff); }
HALFBYTE_INLINE I32 max(I32 a, I32 b) { return a > b ? a : b; }
HALFBYTE_INLINE int32_t reduce_max(I32 v) {
    const int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

class Nearest16 {
  public:
    explicit Nearest16(const Codebook16& book) {
        for (int t = 0; t < 15; ++t) thresholds_[t] = broadcast(book.thresholds[t]);
        memcpy(code_, book.code, sizeof code_);
    }

    HALFBYTE_INLINE I32 rank(F32 v) const {
        I32 below = {};
        for (int t = 0; t < 15; ++t) below -= v > thresholds_[t];  // a comparison that holds is -1
        return below;
    }

    HALFBYTE_INLINE void pack32(const I32* ranks, uint8_t* out) const {
        for (int i = 0; i < 16; ++i) {
            const I32 four = ranks[i / 2];
            const int high = four[2 * (i % 2)], low = four[2 * (i % 2) + 1];
            out[i] = static_cast<uint8_t>(code_[high] << 4 | code_[low]);
        }
    }

  private:
    F32 thresholds_[15];
    uint8_t code_[16];
};

HALFBYTE_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
HALFBYTE_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

HALFBYTE_INLINE void round_to(float x, float* out) { *out = x; }
HALFBYTE_INLINE void round_to(float x, bf16* out) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
HALFBYTE_INLINE void round_to(float x, f16* out) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 and above
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: adding 1/2 leaves the denormal's bits at the bottom
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    out->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

HALFBYTE_INLINE void store(bf16* p, F32 v) {
    const I32 bits = (I32)v;
    const I32 rounded = bits + broadcast(0x7fff) + (bits >> 16 & broadcast(1));
    const I32 safe = v == v ? rounded : broadcast(0x7fc00000);
    for (int i = 0; i < lanes; ++i) p[i].bits = static_cast<uint16_t>(safe[i] >> 16);
}
HALFBYTE_INLINE void store(f16* p, F32 v) {
    for (int i = 0; i < lanes; ++i) round_to(v[i], p + i);
}

template <class T>
class Table16 {
  public:
    explicit Table16(const float* codebook) { memcpy(codebook_, codebook, sizeof codebook_); }

    HALFBYTE_INLINE void scale(float absmax) {
        for (int code = 0; code < 16; ++code) round_to(codebook_[code] * absmax, &table_[code]);
    }
    HALFBYTE_INLINE void expand32(const uint8_t* packed, T* out) const {
        for (int i = 0; i < 16; ++i) {
            out[2 * i] = table_[packed[i] >> 4];
            out[2 * i + 1] = table_[packed[i] & 15];
        }
    }

  private:
    float codebook_[16];
    T table_[16];
};

HALFBYTE_INLINE I32 nearest256(const float* thresholds, F32 v) {
    I32 rank = {};
    for (int size = 128; size > 0; size /= 2) {
        const float* t = thresholds + size - 1;
        rank -= (v > F32{t[rank[0]], t[rank[1]], t[rank[2]], t[rank[3]]}) * size;
    }
    return rank;
}
HALFBYTE_INLINE void store_codes(uint8_t* p, I32 codes) {
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<uint8_t>(codes[i]);
}
HALFBYTE_INLINE F32 lookup256(const float* table, const uint8_t* codes) {
    return F32{table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
}
HALFBYTE_INLINE F32 gather(const float* table, I32 index) {
    return F32{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
HALFBYTE_INLINE I32 gather(const int32_t* table, I32 index) {
    return I32{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

constexpr int registers = 16;

HALFBYTE_INLINE F32 zero() { return F32{}; }
HALFBYTE_INLINE F32 broadcast(const float* p) { return broadcast(*p); }

HALFBYTE_INLINE void transpose(F32* r) {
    const F32 a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = F32{a[i], b[i], c[i], d[i]};
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
