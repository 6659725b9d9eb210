// The dispatch table: every instruction set this build holds, best first. Python asks is_supported and picks
// the first that is, or the one HALFBYTE_IMPLEMENTATION names.

#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace halfbyte {

#define HALFBYTE_DECLARE(isa)     \
    namespace isa {               \
    extern const Kernels kernels; \
    }
HALFBYTE_DECLARE(portable)
#ifdef HALFBYTE_WITH_AVX2
HALFBYTE_DECLARE(avx2)
#endif
#ifdef HALFBYTE_WITH_AVX512
HALFBYTE_DECLARE(avx512)
#endif
#ifdef HALFBYTE_WITH_AVX512BF16
HALFBYTE_DECLARE(avx512bf16)
#endif
#ifdef HALFBYTE_WITH_NEON
HALFBYTE_DECLARE(neon)
#endif
#undef HALFBYTE_DECLARE

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers. It does not know
// F16C by name in every compiler; that one needs no more than AVX's registers.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

const TableEntry implementation_table[] = {
#ifdef HALFBYTE_WITH_AVX512BF16
    {&avx512bf16::kernels, has_avx512bf16, "AVX-512 F, BW, DQ, VL and BF16, AVX2, FMA, F16C"},
#endif
#ifdef HALFBYTE_WITH_AVX512
    {&avx512::kernels, has_avx512, "AVX-512 F, BW, DQ and VL, AVX2, FMA, F16C"},
#endif
#ifdef HALFBYTE_WITH_AVX2
    {&avx2::kernels, has_avx2, "AVX2, FMA, F16C"},
#endif
#ifdef HALFBYTE_WITH_NEON
    {&neon::kernels, always, "nothing beyond aarch64"},
#endif
    {&portable::kernels, always, "nothing beyond the architecture's baseline"},
};
const int implementation_count = sizeof(implementation_table) / sizeof(implementation_table[0]);

}  // namespace halfbyte
