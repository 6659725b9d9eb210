// Dropout by a counter, and products of dense matrices: what LoRA adds to a layer, and the output layer.
// Included by kernels.hpp, whose rules hold.
#pragma once

namespace halfbyte {

// Which values of a matrix are dropped is a function of the seed and of their place alone, so a mask is never
// stored: kernels/dropout.hpp has the function. A value is dropped where its sixteen bits are below
// `threshold`.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;  // of 65536; 0: nothing is dropped
};

//   y = scale · drop(x) · wᵀ     x (rows, depth), w (columns, depth)
//   y = scale · x · drop(w)      transposed: w (depth, columns)
//
// Sums are float32. Rows of `x` lie `x_stride` values apart and, where dtype is bf16 and depth odd, are
// followed by a readable zero; rows of `w` lie `w_stride` apart; y is dense.
struct MatmulDense {
    const void* x;
    int64_t x_stride;
    const void* w;
    int64_t w_stride;
    DType dtype;  // of x and w
    int64_t rows, depth, columns;
    bool transposed;
    float scale;
    Dropout dropout;
    void* y;
    bool y_float32;  // else `dtype`
};

}  // namespace halfbyte
