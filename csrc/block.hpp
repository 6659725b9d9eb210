// The kernels of a transformer block other than its matrix products, the loss behind it, and the optimizer's
// step: all bound by memory, each one pass over it. Sums and functions are float32 whatever the tensors are,
// and what is stored is rounded once. Included by kernels.hpp, whose rules hold here.
#pragma once

namespace halfbyte {

// loss[r] = logsumexp(x[r]) - x[r][target[r]], and the gradient of it to the logits, written over them.
// x = softcap * tanh(scale * logits / softcap), or scale * logits if softcap is 0.
struct CrossEntropy {
    void* logits;  // rows * vocabulary of `dtype`; left as they are unless `gradient`
    DType dtype;
    int64_t rows;
    int64_t vocabulary;
    const int64_t* targets;  // rows, each in [0, vocabulary)
    float scale;
    float softcap;
    bool gradient;
    float* losses;  // rows
};

// y = (x - mean) * rstd * (offset + weight) + bias, over each row; without `mean` it is taken as 0.
struct NormForward {
    const void* x;  // rows * columns of `dtype`, as are y and, for one row, weight and bias
    const void* weight;
    const void* bias;  // null: none
    DType dtype;
    int64_t rows;
    int64_t columns;
    float eps;
    float offset;
    void* y;
    float* mean;  // rows; null: root-mean-square normalization
    float* rstd;  // rows; 1 / sqrt(mean of squares + eps)
};

struct NormBackward {
    const void* grad;  // of y
    const void* x;
    const void* weight;
    const float* mean;  // null as above
    const float* rstd;
    DType dtype;
    int64_t rows;
    int64_t columns;
    float offset;
    void* grad_x;
};

// Rotary position embedding. With a, b the halves of the first `rotary_dim` values of a head and c, s the
// tables:
//   forward   y = (a * c_a - b * s_a,  b * c_b + a * s_b)     backward   x = (a * c_a + b * s_b,  b * c_b - a
//   * s_a)
// and values behind `rotary_dim` are copied. Strides are in values; a head's own values are adjacent.
struct Rotary {
    const void* x;
    const void* cos;  // a row of rotary_dim for each position
    const void* sin;
    void* y;
    DType dtype;
    int64_t batch, heads, length;
    int64_t head_dim, rotary_dim;
    int64_t x_stride[3], y_stride[3];  // batch, head, position
    int64_t table_stride[2];           // batch (0: one table for all), position
    bool backward;
};

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2 };

// out = activation(gate) * up. A row's values are adjacent, rows are `stride` values apart.
struct GatedForward {
    const void* gate;
    const void* up;
    void* out;
    DType dtype;
    Activation activation;
    int64_t rows, columns;
    int64_t gate_stride, up_stride, out_stride;
};

struct GatedBackward {
    const void* grad;  // of out; rows * columns
    const void* gate;
    const void* up;
    void* grad_gate;
    void* grad_up;
    DType dtype;
    Activation activation;
    int64_t rows, columns;
    int64_t gate_stride, up_stride;
    int64_t grad_stride;  // between rows of grad_gate, and of grad_up
};

// The numbers of a step of AdamW.
struct AdamWNumbers {
    float keep;  // 1 - lr * weight_decay
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float step_size;         // lr / (1 - beta1^t)
    float root_correction2;  // sqrt(1 - beta2^t)
    float eps;
};

// One step of AdamW on `tensors` parameters, all float32. Arrays of addresses, a tensor each.
struct AdamWStep {
    int64_t tensors;
    const int64_t* sizes;
    float* const* parameters;
    const float* const* grads;
    float* const* exp_avgs;
    float* const* exp_avg_sqs;
    AdamWNumbers numbers;
};

// The same with moments of 8 bits: a code a value, and one absmax for `adamw_8bit_block` values.
constexpr int64_t adamw_8bit_block = 256;
struct AdamW8bitStep {
    int64_t tensors;
    const int64_t* sizes;
    float* const* parameters;
    const float* const* grads;
    uint8_t* const* exp_avgs;
    float* const* exp_avg_absmaxs;
    uint8_t* const* exp_avg_sqs;
    float* const* exp_avg_sq_absmaxs;
    const DynamicMap* exp_avg_map;
    const DynamicMap* exp_avg_sq_map;
    AdamWNumbers numbers;
};

}  // namespace halfbyte
