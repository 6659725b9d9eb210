// Included first by every kernel source. HALFBYTE_ISA is the name of the instruction set this translation
// unit is compiled for; the header of that name defines, inside halfbyte::HALFBYTE_ISA and an anonymous
// namespace:
//
//   lanes                       float32 values in a register; divides 32
//   F32, I32                    registers of `lanes` float32, int32
//   load(T*)                    `lanes` values of float, bf16 or f16, exactly, as F32
//   store(T*, F32)              `lanes` values rounded to T, to nearest even
//   broadcast(float), multiply(F32, F32)
//   multiply_add(a, b, c)                a * b + c, rounded once where the hardware can
//   sqrt(F32), max(F32, F32), reduce_add(F32), reduce_max(F32)
//   zero_bits(), magnitude_bits(F32), max(I32, I32), reduce_max(I32)
//   Nearest16(const Codebook16&)
//       .rank(F32) -> I32       how many thresholds lie below each value
//       .pack32(I32*, uint8_t*) 32 ranks -> 32 codes -> 16 bytes, the earlier code in the high nibble
//   Table16<T>(const float* codebook)
//       .scale(float absmax)            codebook * absmax in float32, rounded to T, to nearest even
//       .expand32(uint8_t*, T*)         16 bytes -> 32 entries of the scaled table
//   nearest256(float* thresholds, F32) -> I32
//   store_codes(uint8_t*, I32)          the low byte of each lane
//   lookup256(float* table, uint8_t* codes) -> F32
//   gather(float* table, I32) -> F32, gather(int32_t* table, I32) -> I32
//   registers                   how many the machine has: 16 or 32
//   zero(), broadcast(float*)
//   transpose(F32*)             a square of `lanes` registers, in place
//
// Kernels are written on these names alone. Everything is static to its translation unit: see kernels.hpp.
#pragma once

#include <cstring>

#include "../kernels.hpp"

#define HALFBYTE_INLINE inline __attribute__((always_inline))
#define HALFBYTE_STRING_(x) #x
#define HALFBYTE_STRING(x) HALFBYTE_STRING_(x)

#define HALFBYTE_HEADER_portable "portable.hpp"
#define HALFBYTE_HEADER_avx2 "avx2.hpp"
#define HALFBYTE_HEADER_avx512 "avx512.hpp"
#define HALFBYTE_HEADER_avx512bf16 "avx512bf16.hpp"
#define HALFBYTE_HEADER_neon "neon.hpp"
#define HALFBYTE_PASTE_(a, b) a##b
#define HALFBYTE_PASTE(a, b) HALFBYTE_PASTE_(a, b)

#include HALFBYTE_PASTE(HALFBYTE_HEADER_, HALFBYTE_ISA)
