// The product of activations with a 4-bit weight, seen from outside. Included by kernels.hpp, whose rules
// hold.
#pragma once

#include "matmul_dense.hpp"

namespace halfbyte {

// A weight of `out_features` rows and `in_features` columns in row-major blocks of `block_size` (a power of
// two from 32) values. The scale of block b is `absmax[b]` or, where that is null, what double quantization
// left: `nested_codebook[absmax_codes[b]] * nested_absmax[b / 256] + nested_offset`, each step rounded to
// float32.
struct Weight4bit {
    const uint8_t* packed;  // (out_features * in_features + 1) / 2 bytes
    const float* absmax;
    const uint8_t* absmax_codes;
    const float* nested_absmax;
    const float* nested_codebook;  // 256
    float nested_offset;
    const float* codebook;  // 16
    int64_t block_size;
    int64_t out_features;
    int64_t in_features;
};

constexpr int64_t most_terms = 8;

struct Matmul4bitTerm {
    const void* x;
    int64_t x_stride;
    Weight4bit weight;
};

//                forward                     transposed: the gradient to the input
//   y            x · Wᵀ + left · rightᵀ      Σ x · W + left · right
//   x            (rows, in_features)         (rows, out_features)
//   right        (out_features, rank)        (rank, in_features)
//   y            (rows, out_features)        (rows, in_features)
//
// Weights are rounded to `dtype` before they are multiplied, sums are float32. Rows of `x` and `left` lie
// `stride` values apart, `right` and `y` are dense. Where dtype is bf16, rows of `x` and `left` that have an
// odd length are followed by a readable zero: values are taken in pairs.
struct Matmul4bit {
    const Matmul4bitTerm*
        terms;  // one, or at most `most_terms` of the same in_features where they are summed
    int64_t term_count;
    DType dtype;  // of x, left, right and y
    int64_t rows;
    bool transposed;
    const void* left;  // (rows, rank)
    int64_t left_stride;
    const void* right;
    int64_t rank;     // 0: no low-rank term
    Dropout dropout;  // of the product of left and right, as a matrix of the shape of y; not for a few rows
                      // forward
    void* y;
};

}  // namespace halfbyte
