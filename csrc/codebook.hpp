// From a codebook to the thresholds its nearest-entry search needs. Done once a call; costs well under a
// microsecond.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

// `entries` in any order. Of two equal entries the one with the lower code ranks first, which is where values
// up to and including the shared one go: zero itself is code 0 in FP4, and 7 in INT4.
Codebook16 prepare_codebook16(const float* entries);

// False when `entries` do not ascend.
bool prepare_codebook256(const float* entries, Codebook256* prepared);

// False when `entries` do not ascend or two thresholds share a cell, which those of the two dynamic maps do
// not.
bool prepare_dynamic_map(const float* entries, DynamicMap* prepared);

}  // namespace halfbyte
