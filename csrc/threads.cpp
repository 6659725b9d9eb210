// torch runs its own loops on GNU OpenMP, whose workers spin for a while after each region. A second pool
// beside it would fight those workers for the cores, so ours must be the same pool: the same copy of
// `libgomp.so.1` (the name torch's wheel carries; the dynamic linker keeps one copy per name). clang's
// -fopenmp brings a runtime of its own, so the two entry points we need are declared here and called
// directly: they are libgomp's stable interface, the same that `#pragma omp parallel` compiles to.

#include "threads.hpp"

#include <cstdlib>
#include <new>
#include <thread>

#ifdef HALFBYTE_WITH_GOMP
extern "C" {
void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}
#endif

namespace halfbyte {

#ifdef HALFBYTE_WITH_GOMP
namespace {

struct Job {
    int64_t tasks;
    void (*body)(void*, int64_t, int64_t);
    void* context;
};

void run_share(void* data) {
    const Job& job = *static_cast<const Job*>(data);
    // The team can be smaller than asked for (inside another parallel region), so divide by what came.
    const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
    const int64_t share = job.tasks / team, extra = job.tasks % team;
    const int64_t begin = member * share + (member < extra ? member : extra);
    const int64_t end = begin + share + (member < extra ? 1 : 0);
    if (begin < end) job.body(job.context, begin, end);
}

struct Team {
    void (*body)(void*, int, int);
    void* context;
};

void run_member(void* data) {
    const Team& team = *static_cast<const Team*>(data);
    team.body(team.context, omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace
#endif

void parallel_for(int64_t tasks, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t),
                  void* context) {
    if (tasks <= 0) return;
    const int64_t grains = tasks / (grain > 0 ? grain : 1);
    const int64_t team = grains < threads ? grains : threads;
#ifdef HALFBYTE_WITH_GOMP
    if (team > 1) {
        Job job{tasks, body, context};
        GOMP_parallel(run_share, &job, static_cast<unsigned>(team), 0);
        return;
    }
#else
    (void)team;
#endif
    body(context, 0, tasks);
}

void run_team(int threads, void (*body)(void*, int, int), void* context) {
#ifdef HALFBYTE_WITH_GOMP
    if (threads > 1) {
        Team team{body, context};
        GOMP_parallel(run_member, &team, static_cast<unsigned>(threads), 0);
        return;
    }
#else
    (void)threads;
#endif
    body(context, 0, 1);
}

void wait_until(const int64_t* counter, int64_t count) {
    // Whom we wait for may have lost its core to another process, perhaps to us.
    constexpr int patience = 20000;
    for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < count; ++spins)
        if (spins > patience) std::this_thread::yield();
}

namespace {

struct Buffer {
    void* address = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(address); }
};
thread_local Buffer buffer;

}  // namespace

void* thread_buffer(size_t bytes) {
    if (buffer.bytes < bytes) {
        std::free(buffer.address);
        buffer.address = nullptr;
        buffer.bytes = 0;
        const size_t lines = (bytes + 63) / 64;
        void* address = std::aligned_alloc(64, lines * 64);
        if (address == nullptr) throw std::bad_alloc();
        buffer.address = address;
        buffer.bytes = lines * 64;
    }
    return buffer.address;
}

}  // namespace halfbyte
