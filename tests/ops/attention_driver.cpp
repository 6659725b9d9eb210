// Runs one instruction set's attention, forward and backward, on cases written by test_attention_neon.py.
// Built and run on a processor other than the tests' own, so it knows no Python.
//
// A case: int64 batches, heads, kv_heads, queries, keys, head_dim, dtype, window; float scale, softcap,
// tolerance; q, k, v, dout in `dtype`, each (batch, row, head, head_dim); int32 segment starts; then, in
// float32, what is expected of out, logsumexp, dq, dk, dv. No value may be further from it than the
// tolerance.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/kernels/table.hpp"

using namespace halfbyte;
using Bytes = std::vector<unsigned char>;

static Bytes read(std::FILE* file, int64_t size) {
    Bytes bytes(static_cast<size_t>(size));
    if (size > 0 && std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::abort();
    return bytes;
}

static float value_of(const Bytes& bytes, size_t i, bool half) {
    uint32_t bits = 0;
    if (half) {
        uint16_t upper;
        std::memcpy(&upper, bytes.data() + 2 * i, 2);
        bits = static_cast<uint32_t>(upper) << 16;
    } else {
        std::memcpy(&bits, bytes.data() + 4 * i, 4);
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static bool is_close(std::FILE* file, const Bytes& got, bool half, float tolerance) {
    const size_t count = got.size() / (half ? 2 : 4);
    const Bytes expected = read(file, static_cast<int64_t>(4 * count));
    bool close = true;
    for (size_t i = 0; i < count; ++i)
        close &= std::fabs(value_of(got, i, half) - value_of(expected, i, false)) <= tolerance;
    return close;
}

static bool run_case(std::FILE* file, const int64_t* head) {
    const Kernels& kernels = HALFBYTE_ISA::kernels;
    const AttentionShape s = {head[0], head[1], head[2], head[3], head[4], head[5]};
    const bool half = head[6] == static_cast<int64_t>(DType::bf16);
    float numbers[3];
    if (std::fread(numbers, sizeof numbers, 1, file) != 1) std::abort();

    const int64_t queries = s.batches * s.queries * s.heads * s.head_dim * (half ? 2 : 4);
    const int64_t keys = s.batches * s.keys * s.kv_heads * s.head_dim * (half ? 2 : 4);
    const Bytes q = read(file, queries), k = read(file, keys), v = read(file, keys),
                dout = read(file, queries);
    const Bytes starts = read(file, 4 * s.batches * s.queries);
    const auto rows = [&](const Bytes& x, int64_t count, int64_t heads) {
        return AttentionRows{x.data(), count * heads * s.head_dim, s.head_dim, heads * s.head_dim};
    };
    Bytes out(q.size(), 0xff), dq(q.size(), 0xff), dk(k.size(), 0xff), dv(k.size(), 0xff);
    std::vector<float> logsumexp(static_cast<size_t>(s.batches * s.heads * s.queries));
    // Rounded up, so that the workspace begins where a register may.
    std::vector<double> space(static_cast<size_t>(kernels.attention_workspace_bytes(s) / 8 + 1));
    std::vector<double> backward_space(
        static_cast<size_t>(kernels.attention_backward_workspace_bytes(s, 1) / 8 + 1));

    AttentionBackward call = {
        {s, static_cast<DType>(head[6]), rows(q, s.queries, s.heads), rows(k, s.keys, s.kv_heads),
         rows(v, s.keys, s.kv_heads), reinterpret_cast<const int32_t*>(starts.data()), head[7], numbers[0],
         numbers[1], out.data(), logsumexp.data(), space.data()},
        rows(dout, s.queries, s.heads),
        dq.data(),
        dk.data(),
        dv.data()};
    kernels.attention(call.forward, 1);
    call.forward.workspace = backward_space.data();
    kernels.attention_backward(call, 1);

    Bytes sums(logsumexp.size() * 4);
    std::memcpy(sums.data(), logsumexp.data(), sums.size());
    bool close = is_close(file, out, half, numbers[2]);
    close &= is_close(file, sums, false, numbers[2]);
    close &= is_close(file, dq, half, numbers[2]);
    close &= is_close(file, dk, half, numbers[2]);
    return close & is_close(file, dv, half, numbers[2]);
}

int main(int, char** arguments) {
    std::FILE* file = std::fopen(arguments[1], "rb");
    if (!file) return 2;
    int64_t head[8];
    int cases = 0, wrong = 0;
    while (std::fread(head, sizeof head, 1, file) == 1) {
        ++cases;
        wrong += !run_case(file, head);
    }
    std::printf("%s: %d cases, %d wrong\n", HALFBYTE_ISA::kernels.name, cases, wrong);
    return wrong == 0 ? 0 : 1;
}
