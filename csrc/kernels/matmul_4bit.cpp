// The product with a weight of 4-bit codes, and with its transpose. A handful of rows, as in decoding, reads
// each code for one product: that is matvec_4bit.hpp; more of them share panels: that is product.hpp.

#include "matvec_4bit.hpp"
#include "product.hpp"
#include "table.hpp"

namespace halfbyte::HALFBYTE_ISA {
namespace {

template <class P, class T>
HALFBYTE_INLINE void matmul_of_type(const Matmul4bit& call, int threads) {
    using Weight = QuantizedRows<P, T>;
    Term<T, Weight4bit> terms[most_terms];
    for (int64_t i = 0; i < call.term_count; ++i) {
        const Matmul4bitTerm& given = call.terms[i];
        terms[i] = {static_cast<const T*>(given.x), given.x_stride,
                    call.transposed ? given.weight.out_features : given.weight.in_features, given.weight};
    }
    const Weight4bit& first = call.terms->weight;
    const int64_t columns = call.transposed ? first.in_features : first.out_features;
    const int64_t right_stride = call.transposed ? columns : call.rank;
    run_product<P, WideTile>(
        Product<T, T, Weight>{terms, call.term_count, call.rows, columns, call.transposed, Dropout{0, 0},
                              static_cast<const T*>(call.left), call.left_stride,
                              DenseRows<T>(call.right, right_stride, right_stride, Dropout{0, 0}), call.rank,
                              call.dropout, 1.0f, static_cast<T*>(call.y), Grid{}, 0},
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
