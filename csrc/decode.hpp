// One token through a whole model of the Llama family, seen from outside. Included by kernels.hpp, whose
// rules hold.
#pragma once

#include "matmul_4bit.hpp"

namespace halfbyte {

struct bf16;

// y = W x + bias + B (A x). A is (rank, in), B is (out, rank) and holds the scaling; rank is a multiple
// of 16.
struct DecodeLinear {
    Weight4bit weight;
    const float* bias;  // or null
    const bf16* lora_a;
    const bf16* lora_b;
    int64_t rank;  // 0: no adapter
};

struct DecodeLayer {
    const float* attention_norm;  // (hidden)
    const float* mlp_norm;        // (hidden)
    const float* query_norm;      // (head_dim), of each head before its rotation; or null
    const float* key_norm;        // likewise
    DecodeLinear linears[7];      // as below
};

enum { decode_query, decode_key, decode_value, decode_output, decode_gate, decode_up, decode_down };

struct DecodeToken {
    const DecodeLayer* layers;
    int64_t layer_count;
    int64_t hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
    int64_t most_rank;      // of the adapters
    float epsilon;          // of the norms
    float attention_scale;  // of query · key
    const float* final_norm;
    const bf16* embedding;  // (hidden), the token's
    const bf16* head;       // (vocabulary, hidden)
    const float* cos;       // (head_dim), of the token's position
    const float* sin;
    bf16* keys;  // (layers, kv_heads, capacity, head_dim); the token's are written at `position`
    bf16* values;
    int64_t capacity, position;
    float* logits;  // (vocabulary)
};

}  // namespace halfbyte
