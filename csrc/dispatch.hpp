#pragma once

#include "kernels.hpp"

namespace halfbyte {

struct TableEntry {
    const Kernels* kernels;
    bool (*is_supported)();
    const char* needs;  // for a person: what the processor must have
};

extern const TableEntry implementation_table[];  // best first
extern const int implementation_count;

}  // namespace halfbyte
