// Causal attention as the kernels see it. Included from kernels.hpp, under the same rules.
//
// Query i stands at position p = i + keys - queries, so that the last query is the last key's own. It sees
// the keys
//
//     [max(segment_start[batch][i], p - window + 1), p]
//
// and always itself. Packed rows, left padding, sliding windows and a cache of earlier keys are all of that
// form.
#pragma once

#include <cstdint>

namespace halfbyte {

enum class DType : int;

struct AttentionShape {
    int64_t batches, heads, kv_heads;  // heads / kv_heads query heads share one key and value head
    int64_t queries, keys;             // queries <= keys
    int64_t head_dim;                  // at most 256
};

// (batch, head, row, head_dim) with the last stride 1 and the others in elements.
struct AttentionRows {
    const void* data;
    int64_t batch_stride, head_stride, row_stride;
};

struct Attention {
    AttentionShape shape;
    DType dtype;  // of q, k, v and out
    AttentionRows q, k, v;
    const int32_t* segment_start;  // (batches, queries), or null: every key from the first on
    int64_t window;                // 0: as far back as the segment goes
    float scale;                   // of q.k, before the soft cap
    float softcap;                 // score = softcap tanh(score / softcap); 0: none
    void* out;                     // (batch, query, head, head_dim), contiguous
    float* logsumexp;              // (batch, head, query), contiguous; of the scores, natural
    void* workspace;
};

struct AttentionBackward {
    Attention forward;  // as it was; workspace is the backward's own
    AttentionRows dout;
    void *dq, *dk, *dv;  // (batch, row, head, head_dim), contiguous
};

}  // namespace halfbyte
