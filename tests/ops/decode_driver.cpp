// Runs one instruction set's decode_token on cases written by test_decode_neon.py. Built and run on a
// processor other than the tests' own, so it knows no Python.
//
// A case: int64 hidden, intermediate, heads, kv_heads, head_dim, vocabulary, capacity, position, block_size,
// rank; float epsilon, scale; the codebook; for each of the seven linear layers its codes, absmax, bias,
// lora_a and lora_b; both norms and the last; the token's embedding; the output layer; cos and sin; keys and
// values; then the logits that are expected, of which the difference may be 1/100 of their own size.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <vector>

#include "../../csrc/kernels/table.hpp"

using namespace halfbyte;

class Reader {
  public:
    explicit Reader(std::FILE* file) : file_(file) {}

    // Kept until the case is done.
    template <class T>
    T* read(int64_t count) {
        return static_cast<T*>(read_bytes(static_cast<size_t>(count) * sizeof(T)));
    }
    // The type itself is known to the kernels alone.
    bf16* read_halves(int64_t count) {
        return static_cast<bf16*>(read_bytes(static_cast<size_t>(count) * 2));
    }

  private:
    void* read_bytes(size_t bytes) {
        arrays_.emplace_back(bytes / sizeof(double) + 1);
        if (std::fread(arrays_.back().data(), 1, bytes, file_) != bytes) std::abort();
        return arrays_.back().data();
    }

    std::FILE* file_;
    std::list<std::vector<double>> arrays_;
};

static bool run_case(std::FILE* file, const int64_t* head) {
    Reader reader(file);
    DecodeToken call = {};
    call.hidden = head[0], call.intermediate = head[1], call.heads = head[2], call.kv_heads = head[3];
    call.head_dim = head[4], call.vocabulary = head[5], call.capacity = head[6], call.position = head[7];
    const int64_t block_size = head[8], rank = head[9];
    const float* const numbers = reader.read<float>(2);
    call.epsilon = numbers[0], call.attention_scale = numbers[1], call.most_rank = rank;
    const float* const codebook = reader.read<float>(16);

    const int64_t queries = call.heads * call.head_dim, cached = call.kv_heads * call.head_dim;
    const int64_t shapes[7][2] = {{queries, call.hidden},
                                  {cached, call.hidden},
                                  {cached, call.hidden},
                                  {call.hidden, queries},
                                  {call.intermediate, call.hidden},
                                  {call.intermediate, call.hidden},
                                  {call.hidden, call.intermediate}};
    DecodeLayer layer = {};
    for (int i = 0; i < 7; ++i) {
        const int64_t out = shapes[i][0], in = shapes[i][1], n = out * in;
        Weight4bit weight = {};
        weight.packed = reader.read<uint8_t>((n + 1) / 2);
        weight.absmax = reader.read<float>((n + block_size - 1) / block_size);
        weight.codebook = codebook, weight.block_size = block_size;
        weight.out_features = out, weight.in_features = in;
        const float* const bias = reader.read<float>(out);
        const bf16* const lora_a = reader.read_halves(rank * in);
        layer.linears[i] = {weight, bias, lora_a, reader.read_halves(out * rank), rank};
    }
    layer.attention_norm = reader.read<float>(call.hidden);
    layer.mlp_norm = reader.read<float>(call.hidden);
    call.final_norm = reader.read<float>(call.hidden);
    call.layers = &layer, call.layer_count = 1;
    call.embedding = reader.read_halves(call.hidden);
    call.head = reader.read_halves(call.vocabulary * call.hidden);
    call.cos = reader.read<float>(call.head_dim);
    call.sin = reader.read<float>(call.head_dim);
    call.keys = reader.read_halves(call.capacity * cached);
    call.values = reader.read_halves(call.capacity * cached);
    const float* const expected = reader.read<float>(call.vocabulary);
    std::vector<float> logits(static_cast<size_t>(call.vocabulary), NAN);
    call.logits = logits.data();
    HALFBYTE_ISA::kernels.decode_token(call, 1);

    double difference = 0, size = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
        difference += (logits[i] - expected[i]) * (logits[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return std::sqrt(difference) <= 0.01 * std::sqrt(size);
}

int main(int, char** arguments) {
    std::FILE* file = std::fopen(arguments[1], "rb");
    if (!file) return 2;
    int64_t head[10];
    int cases = 0, wrong = 0;
    while (std::fread(head, sizeof head, 1, file) == 1) {
        ++cases;
        wrong += !run_case(file, head);
    }
    std::printf("%s: %d cases, %d wrong\n", HALFBYTE_ISA::kernels.name, cases, wrong);
    return wrong == 0 ? 0 : 1;
}
