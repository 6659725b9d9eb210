// What this machine's cores can do when nothing stands in their way: the yardstick of every "share
// of the peak".
//
//   arithmetic   a loop that touches registers alone: no loads, and as many independent sums as it
//                takes to hide the latency of one
//   memory       every core reads (or copies) its part of a buffer far larger than any cache
//
// Usage: peak THREADS [arithmetic]. Prints one JSON object, of arithmetic alone if so asked. An instruction
// set that is not here is null, never a guess.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

namespace {

constexpr long kIterations = 20'000'000;
constexpr int kAttempts = 5;                        // the best one counts: a peak is not a mean
constexpr std::size_t kBytesPerThread = 256 << 20;  // several times any last-level cache

// What the compiler must believe to be used.
volatile float sink;

// Runs `work(thread)` on every thread at once; the time from the common start to the last finish.
template <typename Work>
double seconds_together(int threads, Work work) {
    std::atomic<int> waiting{threads};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int thread = 0; thread < threads; ++thread) {
        pool.emplace_back([&, thread] {
            --waiting;
            while (!go.load(std::memory_order_acquire)) {
            }
            work(thread);
        });
    }
    while (waiting.load() != 0) std::this_thread::yield();
    const auto started = std::chrono::steady_clock::now();
    go.store(true, std::memory_order_release);
    for (auto& worker : pool) worker.join();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

// Work a second, the best of a few attempts.
template <typename Work>
double best_rate(int threads, double amount_per_thread, Work work) {
    double best = 0;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
        best = std::max(best, threads * amount_per_thread / seconds_together(threads, work));
    }
    return best;
}

#if defined(__x86_64__)

// One function an instruction set: a target attribute does not reach into a lambda or a template argument.

__attribute__((target("avx512f,avx512bf16"))) void bf16_dot_products(long iterations) {
    __m512 sums[24];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3F), _mm512_set1_ps(1e-3F));
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
        for (int k = 0; k < 24; ++k) sums[k] = _mm512_dpbf16_ps(sums[k], a, a);
    }
    for (auto& sum : sums) sink = _mm512_cvtss_f32(sum);
}

__attribute__((target("avx512f"))) void float32_avx512(long iterations) {
    __m512 sums[24];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    const __m512 a = _mm512_set1_ps(1e-3F);
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
        for (int k = 0; k < 24; ++k) sums[k] = _mm512_fmadd_ps(a, a, sums[k]);
    }
    for (auto& sum : sums) sink = _mm512_cvtss_f32(sum);
}

__attribute__((target("avx2,fma"))) void float32_avx2(long iterations) {
    __m256 sums[12];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    const __m256 a = _mm256_set1_ps(1e-3F);
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < 12; ++k) sums[k] = _mm256_fmadd_ps(a, a, sums[k]);
    }
    for (auto& sum : sums) sink = _mm256_cvtss_f32(sum);
}

double bf16_peak(int threads) {
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    const double flops = kIterations * 24.0 * 64;  // 16 sums of 2 products each
    return best_rate(threads, flops, [](int) { bf16_dot_products(kIterations); });
}

double float32_peak(int threads) {
    if (__builtin_cpu_supports("avx512f")) {
        return best_rate(threads, kIterations * 24.0 * 32, [](int) { float32_avx512(kIterations); });
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return best_rate(threads, kIterations * 12.0 * 16, [](int) { float32_avx2(kIterations); });
    }
    return 0;
}

#elif defined(__aarch64__)

__attribute__((target("arch=armv8.2-a+bf16"))) void bf16_dot_products(long iterations) {
    float32x4_t sums[24];
    for (auto& sum : sums) sum = vdupq_n_f32(0);
    const bfloat16x8_t a = vdupq_n_bf16(vcvth_bf16_f32(1e-3F));
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
        for (int k = 0; k < 24; ++k) sums[k] = vbfdotq_f32(sums[k], a, a);
    }
    for (auto& sum : sums) sink = vgetq_lane_f32(sum, 0);
}

void float32_neon(long iterations) {
    float32x4_t sums[24];
    for (auto& sum : sums) sum = vdupq_n_f32(0);
    const float32x4_t a = vdupq_n_f32(1e-3F);
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
        for (int k = 0; k < 24; ++k) sums[k] = vfmaq_f32(sums[k], a, a);
    }
    for (auto& sum : sums) sink = vgetq_lane_f32(sum, 0);
}

double bf16_peak(int threads) {
    constexpr unsigned long kHasBf16 = 1UL << 14;  // HWCAP2_BF16
    if (!(getauxval(AT_HWCAP2) & kHasBf16)) return 0;
    return best_rate(threads, kIterations * 24.0 * 16, [](int) { bf16_dot_products(kIterations); });
}

double float32_peak(int threads) {
    return best_rate(threads, kIterations * 24.0 * 8, [](int) { float32_neon(kIterations); });
}

#else

double bf16_peak(int) { return 0; }
double float32_peak(int) { return 0; }

#endif

std::uint64_t sum_words(const std::uint64_t* words, std::size_t count) {
    std::uint64_t sums[16] = {};
    for (std::size_t i = 0; i + 16 <= count; i += 16) {
        for (int k = 0; k < 16; ++k) sums[k] += words[i + k];
    }
    std::uint64_t total = 0;
    for (auto sum : sums) total += sum;
    return total;
}

struct Bandwidth {
    double read;
    double copy;  // bytes read plus bytes written
};

Bandwidth memory_bandwidth(int threads) {
    std::vector<std::vector<std::uint64_t>> from(threads), to(threads);
    // Each thread touches its own part first, so that it is near it on a machine with several memories.
    seconds_together(threads, [&](int thread) {
        from[thread].assign(kBytesPerThread / 8, 1);
        to[thread].assign(kBytesPerThread / 8, 2);
    });
    Bandwidth found{};
    found.read = best_rate(threads, kBytesPerThread, [&](int thread) {
        sink = static_cast<float>(sum_words(from[thread].data(), from[thread].size()));
    });
    found.copy = best_rate(threads, 2.0 * kBytesPerThread, [&](int thread) {
        std::memcpy(to[thread].data(), from[thread].data(), kBytesPerThread);
    });
    return found;
}

void print_rate(const char* name, double rate) {
    if (rate > 0) {
        std::printf("\"%s\": %.4g", name, rate);
    } else {
        std::printf("\"%s\": null", name);
    }
}

}  // namespace

int main(int count, char** arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 0;
    if (threads < 1) {
        std::fprintf(stderr, "usage: peak THREADS [arithmetic]\n");
        return 2;
    }
    std::printf("{\"threads\": %d, ", threads);
    if (count < 3) {
        const Bandwidth bandwidth = memory_bandwidth(threads);
        print_rate("read_bytes_per_second", bandwidth.read);
        std::printf(", ");
        print_rate("copy_bytes_per_second", bandwidth.copy);
        std::printf(", ");
    }
    print_rate("bf16_flops", bf16_peak(threads));
    std::printf(", ");
    print_rate("float32_flops", float32_peak(threads));
    std::printf("}\n");
    return 0;
}
