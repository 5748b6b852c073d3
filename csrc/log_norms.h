// Norms as 8-bit logarithms, with a range per group of vectors.
#pragma once

#include <cstdint>

namespace fibkv {

// norms [tokens] >= 0 -> codes [tokens], and range [2]: the lowest log2 norm and the step, both exact in float16.
// Code 0 is the norm 0.
void encode_log_norms(const double* norms, int64_t tokens, uint8_t* codes, double* range);

// The way back.
void decode_log_norms(const uint8_t* codes, const float* range, int64_t tokens, float* norms);

}  // namespace fibkv
