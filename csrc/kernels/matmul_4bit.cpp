// The product with a weight of 4-bit codes, and with its transpose. A handful of rows, as in decoding, reads
// each code for one product: that is matvec_4bit.hpp; more of them share panels: that is product.hpp.

#include "matvec_4bit.hpp"
#include "product.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <class P, class T>
HALFBYTE_INLINE void matmul_of_type(const Matmul4bit& call, int threads) {
    const int64_t out = call.weight.out_features, in = call.weight.in_features;
    const int64_t depth = call.transposed ? out : in, columns = call.transposed ? in : out;
    const int64_t right_stride = call.transposed ? columns : call.rank;
    run_product<P, WideTile>(
        Product<T, T, QuantizedRows<P, T>>{
            static_cast<const T*>(call.x), call.x_stride, call.rows, depth, columns,
            QuantizedRows<P, T>(call.weight), call.transposed, Dropout{0, 0},
            static_cast<const T*>(call.left), call.left_stride,
            DenseRows<T>(call.right, right_stride, right_stride, Dropout{0, 0}), call.rank, call.dropout,
            1.0f, static_cast<T*>(call.y), Grid{}, 0},
        threads);
}

}  // namespace

void matmul_4bit(const Matmul4bit& call, int threads) {
    if (is_matvec(call)) return matvec_4bit(call, threads);
    if (call.dtype == DType::f32) matmul_of_type<Singles, float>(call, threads);
    if (call.dtype == DType::bf16) matmul_of_type<Bf16Operand, bf16>(call, threads);
    if (call.dtype == DType::f16) matmul_of_type<Singles, f16>(call, threads);
}

}  // namespace halfbyte::HALFBYTE_ISA
