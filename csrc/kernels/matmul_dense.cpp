// Products of dense matrices, most of them with one side of low rank.

#include "product.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <class P, class S, class T, class Y>
HALFBYTE_INLINE void matmul_of_shape(const MatmulDense& call, int threads) {
    const Dropout none = {0, 0};
    const int64_t row_length = call.transposed ? call.columns : call.depth;
    const DenseRows<T> w(call.w, call.w_stride, row_length, call.transposed ? call.dropout : none);
    const Term<T, DenseRows<T>> term{static_cast<const T*>(call.x), call.x_stride, call.depth, w};
    run_product<P, S>(Product<T, Y, DenseRows<T>>{&term, 1, call.rows, call.columns, call.transposed,
                                                  call.transposed ? none : call.dropout, nullptr, 0, w, 0,
                                                  none, call.scale, static_cast<Y*>(call.y), Grid{}, 0},
                      threads);
}

template <class P, class S, class T>
HALFBYTE_INLINE void matmul_of_result(const MatmulDense& call, int threads) {
    if (call.y_float32) return matmul_of_shape<P, S, T, float>(call, threads);
    matmul_of_shape<P, S, T, T>(call, threads);
}

template <class P, class T>
HALFBYTE_INLINE void matmul_of_type(const MatmulDense& call, int threads) {
    if constexpr (lanes == 16) {
        if (call.columns <= NarrowestTile::columns)
            return matmul_of_result<P, NarrowestTile, T>(call, threads);
        if (call.columns <= NarrowTile::columns) return matmul_of_result<P, NarrowTile, T>(call, threads);
    }
    matmul_of_result<P, WideTile, T>(call, threads);
}

}  // namespace

void matmul_dense(const MatmulDense& call, int threads) {
    if (call.dtype == DType::f32) matmul_of_type<Singles, float>(call, threads);
    if (call.dtype == DType::bf16) matmul_of_type<Bf16Operand, bf16>(call, threads);
    if (call.dtype == DType::f16) matmul_of_type<Singles, f16>(call, threads);
}

}  // namespace halfbyte::HALFBYTE_ISA
