// The only file that knows Python. Tensors arrive as addresses: shapes, types, devices and contiguity are the
// business of halfbyte/ops, where the contract of each op is checked (docs/decisions/0010). Every function
// lets go of the interpreter while it works.

#include <nanobind/nanobind.h>

#include <atomic>
#include <cstring>

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
}
