#include "codebook.hpp"

#include <limits>

namespace halfbyte {

Codebook16 prepare_codebook16(const float* entries) {
    Codebook16 prepared;
    // Insertion sort: sixteen entries, and it is stable, which decides between duplicates.
    for (int i = 0; i < 16; ++i) {
        int slot = i;
        for (; slot > 0 && entries[prepared.code[slot - 1]] > entries[i]; --slot)
            prepared.code[slot] = prepared.code[slot - 1];
        prepared.code[slot] = static_cast<uint8_t>(i);
    }
    for (int rank = 0; rank < 15; ++rank)
        prepared.thresholds[rank] = (entries[prepared.code[rank]] + entries[prepared.code[rank + 1]]) / 2;
    prepared.thresholds[15] = std::numeric_limits<float>::infinity();
    return prepared;
}

bool prepare_codebook256(const float* entries, Codebook256* prepared) {
    bool ascending = true;
    for (int code = 0; code < 255; ++code) {
        ascending &= entries[code] <= entries[code + 1];
        prepared->thresholds[code] = (entries[code] + entries[code + 1]) / 2;
    }
    prepared->thresholds[255] = std::numeric_limits<float>::infinity();
    return ascending;
}

}  // namespace halfbyte
