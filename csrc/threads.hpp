// The only door to threads. Kernels say what to do with a range of tasks; this says who does it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbyte {

// Calls body(context, begin, end) on disjoint ranges that cover [0, tasks), on at most `threads` threads and
// on no more than there are whole grains. The split depends on these three numbers alone.
void parallel_for(int64_t tasks, int64_t grain, int threads,
                  void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Calls body(context, member, team) once on each of at most `threads` threads; `team` is how many there are.
void run_team(int threads, void (*body)(void* context, int member, int team), void* context);

// Waits until `*counter` is at least `count`, for moments of microseconds; what was written before it got
// there is then seen.
void wait_until(const int64_t* counter, int64_t count);

// This thread's scratch memory, at least `bytes` of it, aligned to a cache line; valid until the thread asks
// again. Kept between calls: fresh pages cost more than a small product.
void* thread_buffer(size_t bytes);

}  // namespace halfbyte
