// Runs one instruction set's kernels on cases written by test_neon.py and compares them with what the
// reference wrote, byte for byte. Built and run on a processor other than the tests' own, so it knows no
// Python.
//
// A case: int64 op, dtype, n, block_size, count of codebook entries; the codebook; then, for
//   op 0, 1 (quantize 4-, 8-bit)      values, expected codes, expected absmax
//   op 2, 3 (dequantize 4-, 8-bit)    codes, absmax, expected values
//   op 4 (matmul 4-bit)               int64 rows, out, in, transposed, rank; x, codes, absmax, left, right,
//                                     expected values: of numbers small enough that every sum is exact
//   op 5 (adamw 8-bit)                codebook of the second moment; gradients; with both betas 0, the codes
//                                     and absmax expected of the first and of the second moment

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/codebook.hpp"
#include "../../csrc/kernels/table.hpp"

using namespace halfbyte;
using Bytes = std::vector<unsigned char>;

static Bytes read(std::FILE* file, int64_t size) {
    Bytes bytes(static_cast<size_t>(size));
    if (size > 0 && std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::abort();
    return bytes;
}

static const float* floats(const Bytes& bytes) { return reinterpret_cast<const float*>(bytes.data()); }

static bool run_matmul(std::FILE* file, const int64_t* head, const Bytes& codebook) {
    const int64_t n = head[2], block_size = head[3];
    const DType dtype = static_cast<DType>(head[1]);
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    int64_t shape[5];
    if (std::fread(shape, sizeof shape, 1, file) != 1) std::abort();
    const int64_t rows = shape[0], out = shape[1], in = shape[2], rank = shape[4];
    const bool transposed = shape[3] != 0;
    const int64_t depth = transposed ? out : in, columns = transposed ? in : out;
    const int64_t stride = depth + depth % 2, left_stride = rank + rank % 2;
    const Bytes x = read(file, rows * stride * size), codes = read(file, (n + 1) / 2);
    const Bytes absmax = read(file, 4 * ((n + block_size - 1) / block_size));
    const Bytes left = read(file, rows * left_stride * size), right = read(file, rank * columns * size);
    const Bytes expected = read(file, rows * columns * size);
    Bytes y(expected.size(), 0xff);
    Weight4bit weight = {codes.data(), floats(absmax),   nullptr,    nullptr, nullptr,
                         0.0f,         floats(codebook), block_size, out,     in};
    const Matmul4bitTerm term = {x.data(), stride, weight};
    HALFBYTE_ISA::kernels.matmul_4bit({&term, 1, dtype, rows, transposed, left.data(), left_stride,
                                       right.data(), rank, Dropout{0, 0}, y.data()},
                                      1);
    return y == expected;
}

static bool run_adamw_8bit(std::FILE* file, const int64_t* head, const Bytes& codebook) {
    const int64_t n = head[2], blocks = (n + adamw_8bit_block - 1) / adamw_8bit_block;
    const Bytes second_codebook = read(file, 4 * head[4]), grads = read(file, 4 * n);
    const Bytes expected[4] = {read(file, n), read(file, 4 * blocks), read(file, n), read(file, 4 * blocks)};
    DynamicMap maps[2];
    if (!prepare_dynamic_map(floats(codebook), &maps[0])) return false;
    if (!prepare_dynamic_map(floats(second_codebook), &maps[1])) return false;
    Bytes got[4];
    for (int i = 0; i < 4; ++i) got[i].assign(expected[i].size(), 0);
    Bytes parameter(grads.size(), 0);
    float* parameters = reinterpret_cast<float*>(parameter.data());
    const float* grad = floats(grads);
    float* absmaxs[2] = {reinterpret_cast<float*>(got[1].data()), reinterpret_cast<float*>(got[3].data())};
    uint8_t* codes[2] = {got[0].data(), got[2].data()};
    HALFBYTE_ISA::kernels.adamw_8bit_step({1,
                                           &n,
                                           &parameters,
                                           &grad,
                                           &codes[0],
                                           &absmaxs[0],
                                           &codes[1],
                                           &absmaxs[1],
                                           &maps[0],
                                           &maps[1],
                                           {1.0f, 1.0f, 0.0f, 1.0f, 1e-3f, 1.0f, 1e-8f}},
                                          1);
    for (int i = 0; i < 4; ++i)
        if (got[i] != expected[i]) return false;
    return true;
}

static bool run_case(std::FILE* file, const int64_t* head) {
    const Kernels& kernels = HALFBYTE_ISA::kernels;
    const int64_t op = head[0], n = head[2], block_size = head[3];
    const DType dtype = static_cast<DType>(head[1]);
    const Bytes codebook = read(file, 4 * head[4]);
    if (op == 4) return run_matmul(file, head, codebook);
    if (op == 5) return run_adamw_8bit(file, head, codebook);
    const int64_t value_bytes = n * (dtype == DType::f32 ? 4 : 2);
    const int64_t code_bytes = op % 2 == 0 ? (n + 1) / 2 : n;
    const int64_t absmax_bytes = 4 * ((n + block_size - 1) / block_size);
    if (op < 2) {
        const Bytes values = read(file, value_bytes);
        const Bytes codes = read(file, code_bytes), absmax = read(file, absmax_bytes);
        Bytes got_codes(codes.size(), 0xa5), got_absmax(absmax.size(), 0xa5);
        float* scales = reinterpret_cast<float*>(got_absmax.data());
        int64_t bad = 0;
        if (op == 0) {
            const Codebook16 prepared = prepare_codebook16(floats(codebook));
            bad = kernels.quantize_4bit(
                {values.data(), dtype, n, block_size, &prepared, got_codes.data(), scales}, 1);
        } else {
            Codebook256 prepared;
            if (!prepare_codebook256(floats(codebook), &prepared)) return false;
            bad = kernels.quantize_8bit({floats(values), n, block_size, &prepared, got_codes.data(), scales},
                                        1);
        }
        return bad == -1 && got_codes == codes && got_absmax == absmax;
    }
    const Bytes codes = read(file, code_bytes), absmax = read(file, absmax_bytes),
                values = read(file, value_bytes);
    Bytes got(values.size(), 0xa5);
    if (op == 2)
        kernels.dequantize_4bit(
            {codes.data(), floats(absmax), floats(codebook), n, block_size, got.data(), dtype}, 1);
    else
        kernels.dequantize_8bit({codes.data(), floats(absmax), floats(codebook), n, block_size,
                                 reinterpret_cast<float*>(got.data())},
                                1);
    return got == values;
}

int main(int, char** arguments) {
    std::FILE* file = std::fopen(arguments[1], "rb");
    if (!file) return 2;
    int64_t head[5];
    int cases = 0, wrong = 0;
    while (std::fread(head, sizeof head, 1, file) == 1) {
        ++cases;
        if (!run_case(file, head)) {
            ++wrong;
            std::printf("differs: op %d dtype %d n %d block_size %d\n", static_cast<int>(head[0]),
                        static_cast<int>(head[1]), static_cast<int>(head[2]), static_cast<int>(head[3]));
        }
    }
    std::printf("%s: %d cases, %d wrong\n", HALFBYTE_ISA::kernels.name, cases, wrong);
    return wrong == 0 ? 0 : 1;
}
