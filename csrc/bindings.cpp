// The only file that knows Python. Tensors arrive as addresses: shapes, types, devices and contiguity are the
// business of halfbyte/ops, where the contract of each op is checked (docs/decisions/0010). Every function
// lets go of the interpreter while it works.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "codebook.hpp"
#include "dispatch.hpp"

namespace nb = nanobind;

namespace halfbyte {
namespace {

// The entry in use, and the name of the last that ran: an entry's name is compiled with its kernels, so this
// is what executed and not what was asked for.
std::atomic<const Kernels*> selected{nullptr};
std::atomic<const char*> executed{nullptr};

const Kernels& begin_call() {
    const Kernels* kernels = selected.load(std::memory_order_relaxed);
    executed.store(kernels->name, std::memory_order_relaxed);
    return *kernels;
}

const Kernels* best_supported() {
    for (int i = 0; i < implementation_count; ++i)
        if (implementation_table[i].is_supported()) return implementation_table[i].kernels;
    return nullptr;  // unreachable: portable always is
}

nb::list implementations() {
    nb::list rows;
    for (int i = 0; i < implementation_count; ++i) {
        const TableEntry& entry = implementation_table[i];
        rows.append(nb::make_tuple(entry.kernels->name, entry.is_supported(), entry.needs));
    }
    return rows;
}

bool select(const char* name) {
    for (int i = 0; i < implementation_count; ++i) {
        const TableEntry& entry = implementation_table[i];
        if (std::strcmp(entry.kernels->name, name) == 0 && entry.is_supported()) {
            selected.store(entry.kernels);
            executed.store(nullptr);
            return true;
        }
    }
    return false;
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

int64_t quantize_4bit(uintptr_t values, int dtype, int64_t n, int64_t block_size, uintptr_t codebook,
                      uintptr_t packed, uintptr_t absmax, int threads) {
    const Codebook16 prepared = prepare_codebook16(at<const float>(codebook));
    return begin_call().quantize_4bit({at<const void>(values), static_cast<DType>(dtype), n, block_size,
                                       &prepared, at<uint8_t>(packed), at<float>(absmax)},
                                      threads);
}

void dequantize_4bit(uintptr_t packed, uintptr_t absmax, uintptr_t codebook, int64_t n, int64_t block_size,
                     uintptr_t values, int dtype, int threads) {
    begin_call().dequantize_4bit(
        {at<const uint8_t>(packed), at<const float>(absmax), at<const float>(codebook), n, block_size,
         at<void>(values), static_cast<DType>(dtype)},
        threads);
}

// -2 when the codebook does not ascend.
int64_t quantize_8bit(uintptr_t values, int64_t n, int64_t block_size, uintptr_t codebook, uintptr_t codes,
                      uintptr_t absmax, int threads) {
    Codebook256 prepared;
    if (!prepare_codebook256(at<const float>(codebook), &prepared)) return -2;
    return begin_call().quantize_8bit(
        {at<const float>(values), n, block_size, &prepared, at<uint8_t>(codes), at<float>(absmax)}, threads);
}

void dequantize_8bit(uintptr_t codes, uintptr_t absmax, uintptr_t codebook, int64_t n, int64_t block_size,
                     uintptr_t values, int threads) {
    begin_call().dequantize_8bit({at<const uint8_t>(codes), at<const float>(absmax),
                                  at<const float>(codebook), n, block_size, at<float>(values)},
                                 threads);
}

void cross_entropy(uintptr_t logits, int dtype, int64_t rows, int64_t vocabulary, uintptr_t targets,
                   float scale, float softcap, bool gradient, uintptr_t losses, int threads) {
    begin_call().cross_entropy({at<void>(logits), static_cast<DType>(dtype), rows, vocabulary,
                                at<const int64_t>(targets), scale, softcap, gradient, at<float>(losses)},
                               threads);
}

void norm_forward(uintptr_t x, uintptr_t weight, uintptr_t bias, int dtype, int64_t rows, int64_t columns,
                  float eps, float offset, uintptr_t y, uintptr_t mean, uintptr_t rstd, int threads) {
    begin_call().norm_forward(
        {at<const void>(x), at<const void>(weight), at<const void>(bias), static_cast<DType>(dtype), rows,
         columns, eps, offset, at<void>(y), at<float>(mean), at<float>(rstd)},
        threads);
}

void norm_backward(uintptr_t grad, uintptr_t x, uintptr_t weight, uintptr_t mean, uintptr_t rstd, int dtype,
                   int64_t rows, int64_t columns, float offset, uintptr_t grad_x, int threads) {
    begin_call().norm_backward(
        {at<const void>(grad), at<const void>(x), at<const void>(weight), at<const float>(mean),
         at<const float>(rstd), static_cast<DType>(dtype), rows, columns, offset, at<void>(grad_x)},
        threads);
}

// `sizes` is batch, heads, length, head_dim, rotary_dim; `strides` those of x, of y and of the tables.
void rotary(uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t y, int dtype, std::array<int64_t, 5> sizes,
            std::array<int64_t, 8> strides, bool backward, int threads) {
    begin_call().rotary({at<const void>(x),
                         at<const void>(cos),
                         at<const void>(sin),
                         at<void>(y),
                         static_cast<DType>(dtype),
                         sizes[0],
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         sizes[4],
                         {strides[0], strides[1], strides[2]},
                         {strides[3], strides[4], strides[5]},
                         {strides[6], strides[7]},
                         backward},
                        threads);
}

void gated_forward(uintptr_t gate, uintptr_t up, uintptr_t out, int dtype, int activation, int64_t rows,
                   int64_t columns, int64_t gate_stride, int64_t up_stride, int threads) {
    begin_call().gated_forward(
        {at<const void>(gate), at<const void>(up), at<void>(out), static_cast<DType>(dtype),
         static_cast<Activation>(activation), rows, columns, gate_stride, up_stride, columns},
        threads);
}

void gated_backward(uintptr_t grad, uintptr_t gate, uintptr_t up, uintptr_t grad_gate, uintptr_t grad_up,
                    int dtype, int activation, int64_t rows, int64_t columns, int64_t gate_stride,
                    int64_t up_stride, int64_t grad_stride, int threads) {
    begin_call().gated_backward(
        {at<const void>(grad), at<const void>(gate), at<const void>(up), at<void>(grad_gate),
         at<void>(grad_up), static_cast<DType>(dtype), static_cast<Activation>(activation), rows, columns,
         gate_stride, up_stride, grad_stride},
        threads);
}

// `table` is the address of 5 * tensors integers: sizes, then the addresses of parameters, gradients and
// moments.
void adamw_step(int64_t tensors, uintptr_t table, float keep, float one_minus_beta1, float beta2,
                float one_minus_beta2, float step_size, float root_correction2, float eps, int threads) {
    const int64_t* rows = at<const int64_t>(table);
    begin_call().adamw_step(
        {tensors,
         rows,
         reinterpret_cast<float* const*>(rows + tensors),
         reinterpret_cast<const float* const*>(rows + 2 * tensors),
         reinterpret_cast<float* const*>(rows + 3 * tensors),
         reinterpret_cast<float* const*>(rows + 4 * tensors),
         {keep, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction2, eps}},
        threads);
}

void make_dynamic_map(DynamicMap* map, uintptr_t codebook) {
    if (!prepare_dynamic_map(at<const float>(codebook), map)) throw nb::value_error("not a dynamic map");
}

// As adamw_step; `table` is 7 * tensors integers: each moment's codes are followed by its absmax.
void adamw_8bit_step(int64_t tensors, uintptr_t table, const DynamicMap& exp_avg_map,
                     const DynamicMap& exp_avg_sq_map, float keep, float one_minus_beta1, float beta2,
                     float one_minus_beta2, float step_size, float root_correction2, float eps, int threads) {
    const int64_t* rows = at<const int64_t>(table);
    begin_call().adamw_8bit_step(
        {tensors,
         rows,
         reinterpret_cast<float* const*>(rows + tensors),
         reinterpret_cast<const float* const*>(rows + 2 * tensors),
         reinterpret_cast<uint8_t* const*>(rows + 3 * tensors),
         reinterpret_cast<float* const*>(rows + 4 * tensors),
         reinterpret_cast<uint8_t* const*>(rows + 5 * tensors),
         reinterpret_cast<float* const*>(rows + 6 * tensors),
         &exp_avg_map,
         &exp_avg_sq_map,
         {keep, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction2, eps}},
        threads);
}

// x, x_stride, packed, absmax, absmax_codes, nested_absmax, nested_offset, out_features
using Term4bit = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, float, int64_t>;

void matmul_4bit(const std::vector<Term4bit>& given, int dtype, int64_t rows, uintptr_t nested_codebook,
                 uintptr_t codebook, int64_t block_size, int64_t in_features, bool transposed, uintptr_t left,
                 int64_t left_stride, uintptr_t right, int64_t rank, uint64_t seed, uint32_t threshold,
                 uintptr_t y, int threads) {
    std::vector<Matmul4bitTerm> terms;
    for (const auto& [x, x_stride, packed, absmax, absmax_codes, nested_absmax, nested_offset, out_features] :
         given)
        terms.push_back(
            {at<const void>(x), x_stride,
             Weight4bit{at<const uint8_t>(packed), at<const float>(absmax), at<const uint8_t>(absmax_codes),
                        at<const float>(nested_absmax), at<const float>(nested_codebook), nested_offset,
                        at<const float>(codebook), block_size, out_features, in_features}});
    begin_call().matmul_4bit({terms.data(),
                              static_cast<int64_t>(terms.size()),
                              static_cast<DType>(dtype),
                              rows,
                              transposed,
                              at<const void>(left),
                              left_stride,
                              at<const void>(right),
                              rank,
                              {seed, threshold},
                              at<void>(y)},
                             threads);
}

void matmul_dense(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, int dtype, int64_t rows,
                  int64_t depth, int64_t columns, bool transposed, float scale, uint64_t seed,
                  uint32_t threshold, uintptr_t y, bool y_float32, int threads) {
    begin_call().matmul_dense({at<const void>(x),
                               x_stride,
                               at<const void>(w),
                               w_stride,
                               static_cast<DType>(dtype),
                               rows,
                               depth,
                               columns,
                               transposed,
                               scale,
                               {seed, threshold},
                               at<void>(y),
                               y_float32},
                              threads);
}

using Shape = std::array<int64_t, 6>;  // the members of AttentionShape, in order
using Rows = std::array<int64_t, 4>;   // an address, and the strides of batch, head and row

AttentionShape shape_of(const Shape& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
AttentionRows rows_of(const Rows& r) {
    return {at<const void>(static_cast<uintptr_t>(r[0])), r[1], r[2], r[3]};
}

void attention(const Shape& shape, int dtype, const Rows& q, const Rows& k, const Rows& v,
               uintptr_t segment_start, int64_t window, float scale, float softcap, uintptr_t out,
               uintptr_t logsumexp, uintptr_t workspace, int threads) {
    begin_call().attention({shape_of(shape), static_cast<DType>(dtype), rows_of(q), rows_of(k), rows_of(v),
                            at<const int32_t>(segment_start), window, scale, softcap, at<void>(out),
                            at<float>(logsumexp), at<void>(workspace)},
                           threads);
}

void attention_backward(const Shape& shape, int dtype, const Rows& q, const Rows& k, const Rows& v,
                        uintptr_t segment_start, int64_t window, float scale, float softcap, uintptr_t out,
                        uintptr_t logsumexp, const Rows& dout, uintptr_t dq, uintptr_t dk, uintptr_t dv,
                        uintptr_t workspace, int threads) {
    begin_call().attention_backward({{shape_of(shape), static_cast<DType>(dtype), rows_of(q), rows_of(k),
                                      rows_of(v), at<const int32_t>(segment_start), window, scale, softcap,
                                      at<void>(out), at<float>(logsumexp), at<void>(workspace)},
                                     rows_of(dout),
                                     at<void>(dq),
                                     at<void>(dk),
                                     at<void>(dv)},
                                    threads);
}

int64_t attention_workspace_bytes(const Shape& shape) {
    return selected.load()->attention_workspace_bytes(shape_of(shape));
}

int64_t attention_backward_workspace_bytes(const Shape& shape, int threads) {
    return selected.load()->attention_backward_workspace_bytes(shape_of(shape), threads);
}

// A model for decode_token: sizes, then layer after layer its norms and seven linear layers, then steps.
class DecodeModel {
  public:
    DecodeModel(int64_t hidden, int64_t intermediate, int64_t heads, int64_t kv_heads, int64_t head_dim,
                int64_t vocabulary, float epsilon, float attention_scale, uintptr_t final_norm,
                uintptr_t head) {
        token_.hidden = hidden;
        token_.intermediate = intermediate;
        token_.heads = heads;
        token_.kv_heads = kv_heads;
        token_.head_dim = head_dim;
        token_.vocabulary = vocabulary;
        token_.epsilon = epsilon;
        token_.attention_scale = attention_scale;
        token_.final_norm = at<const float>(final_norm);
        token_.head = at<const bf16>(head);
    }

    void add_layer(uintptr_t attention_norm, uintptr_t mlp_norm, uintptr_t query_norm, uintptr_t key_norm) {
        layers_.push_back({at<const float>(attention_norm),
                           at<const float>(mlp_norm),
                           at<const float>(query_norm),
                           at<const float>(key_norm),
                           {}});
        linears_ = 0;
    }

    // Of the last layer: query, key, value, output, gate, up, down, in this order.
    void add_linear(uintptr_t packed, uintptr_t absmax, uintptr_t absmax_codes, uintptr_t nested_absmax,
                    uintptr_t nested_codebook, float nested_offset, uintptr_t codebook, int64_t block_size,
                    int64_t out_features, int64_t in_features, uintptr_t bias, uintptr_t lora_a,
                    uintptr_t lora_b, int64_t rank) {
        layers_.back().linears[linears_++] = {
            {at<const uint8_t>(packed), at<const float>(absmax), at<const uint8_t>(absmax_codes),
             at<const float>(nested_absmax), at<const float>(nested_codebook), nested_offset,
             at<const float>(codebook), block_size, out_features, in_features},
            at<const float>(bias),
            at<const bf16>(lora_a),
            at<const bf16>(lora_b),
            rank};
        if (rank > token_.most_rank) token_.most_rank = rank;
    }

    void step(uintptr_t embedding, uintptr_t cos, uintptr_t sin, uintptr_t keys, uintptr_t values,
              int64_t capacity, int64_t position, uintptr_t logits, int threads) const {
        DecodeToken token = token_;
        token.layers = layers_.data();
        token.layer_count = static_cast<int64_t>(layers_.size());
        token.embedding = at<const bf16>(embedding);
        token.cos = at<const float>(cos);
        token.sin = at<const float>(sin);
        token.keys = at<bf16>(keys);
        token.values = at<bf16>(values);
        token.capacity = capacity;
        token.position = position;
        token.logits = at<float>(logits);
        begin_call().decode_token(token, threads);
    }

  private:
    DecodeToken token_ = {};
    std::vector<DecodeLayer> layers_;
    int linears_ = 0;
};

}  // namespace
}  // namespace halfbyte

NB_MODULE(_C, m) {
    using namespace nb::literals;
    using unlocked = nb::call_guard<nb::gil_scoped_release>;
    halfbyte::selected.store(halfbyte::best_supported());

    m.doc() = "halfbyte's CPU kernels. Addresses and sizes in; nothing is checked here.";
    m.def("implementations", &halfbyte::implementations, "[(name, runs on this machine, needs)], best first");
    m.def("select", &halfbyte::select, "name"_a, "Use the named implementation; False if it cannot run here");
    m.def("selected", [] { return halfbyte::selected.load()->name; }, "Name of the implementation in use");
    m.def("executed", [] { return halfbyte::executed.load(); }, "Name of the one that ran last, or None");

    m.def("quantize_4bit", &halfbyte::quantize_4bit, unlocked());
    m.def("dequantize_4bit", &halfbyte::dequantize_4bit, unlocked());
    m.def("quantize_8bit", &halfbyte::quantize_8bit, unlocked());
    m.def("dequantize_8bit", &halfbyte::dequantize_8bit, unlocked());
    m.def("cross_entropy", &halfbyte::cross_entropy, unlocked());
    m.def("norm_forward", &halfbyte::norm_forward, unlocked());
    m.def("norm_backward", &halfbyte::norm_backward, unlocked());
    m.def("rotary", &halfbyte::rotary, unlocked());
    m.def("gated_forward", &halfbyte::gated_forward, unlocked());
    m.def("gated_backward", &halfbyte::gated_backward, unlocked());
    m.def("adamw_step", &halfbyte::adamw_step, unlocked());
    nb::class_<halfbyte::DynamicMap>(m, "DynamicMap").def("__init__", &halfbyte::make_dynamic_map);
    m.def("adamw_8bit_step", &halfbyte::adamw_8bit_step, unlocked());
    m.def("matmul_4bit", &halfbyte::matmul_4bit, unlocked());
    m.def("matmul_dense", &halfbyte::matmul_dense, unlocked());
    m.def("attention", &halfbyte::attention, unlocked());
    m.def("attention_backward", &halfbyte::attention_backward, unlocked());
    m.def("attention_workspace_bytes", &halfbyte::attention_workspace_bytes);
    m.def("attention_backward_workspace_bytes", &halfbyte::attention_backward_workspace_bytes);

    nb::class_<halfbyte::DecodeModel>(m, "DecodeModel")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, uintptr_t,
                      uintptr_t>())
        .def("add_layer", &halfbyte::DecodeModel::add_layer)
        .def("add_linear", &halfbyte::DecodeModel::add_linear)
        .def("step", &halfbyte::DecodeModel::step, unlocked());
}
