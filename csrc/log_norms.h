// Norms as 8-bit logarithms, with a range per group of vectors: what the codes mean. encode_norms.h finds them quickly.
#pragma once

#include <cstdint>

namespace fibkv {

// The lowest log2 norm and the step, both exact in float16. Code 0 is the norm 0, code c >= 1 the norm
// 2^(low + (c - 1) step).
struct LogRange {
  double low, step;
};

constexpr int kLogSteps = 254;

// The range of norms >= 0: the least of those that are not 0, and the most, which is 0 where all are.
LogRange log_range(double least, double most);

uint8_t log_norm(double norm, const LogRange& range);

}  // namespace fibkv
