#include "codebook.hpp"

#include <cstring>
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

bool prepare_dynamic_map(const float* entries, DynamicMap* prepared) {
    Codebook256 book;
    if (!prepare_codebook256(entries, &book)) return false;
    std::memcpy(prepared->entries, entries, sizeof prepared->entries);
    std::memcpy(prepared->thresholds, book.thresholds, sizeof prepared->thresholds);
    const auto below = [&](uint32_t magnitude, bool negative) {
        float x;
        std::memcpy(&x, &magnitude, sizeof x);
        if (negative) x = -x;
        int32_t count = 0;
        while (count < 255 && book.thresholds[count] < x) ++count;
        return count;
    };
    bool distinct = true;
    for (int cell = 0; cell < DynamicMap::cells; ++cell) {
        const uint32_t leading = static_cast<uint32_t>(DynamicMap::first_cell + cell);
        const uint32_t least = cell == 0 ? 0 : leading << DynamicMap::shift;
        const uint32_t greatest =
            cell == DynamicMap::cells - 1 ? least : ((leading + 1) << DynamicMap::shift) - 1;
        for (int sign = 0; sign < 2; ++sign) {
            const bool negative = sign == 1;
            const int32_t low = below(negative ? greatest : least, negative),
                          high = below(negative ? least : greatest, negative);
            prepared->below[cell + (negative ? DynamicMap::cells : 0)] = low;
            distinct &= high - low <= 1;
        }
    }
    prepared->zero = below(0, false);
    return distinct;
}

}  // namespace halfbyte
