#include "log_norms.h"

#include <algorithm>
#include <cmath>

namespace fibkv {
namespace {

constexpr double kSteps = 254;  // of a code, from 1 to 255

}  // namespace

void encode_log_norms(const double* norms, int64_t tokens, uint8_t* codes, double* range) {
  double least = INFINITY, most = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (norms[t] > 0) least = std::min(least, norms[t]);
    most = std::max(most, norms[t]);
  }
  // Rounded outwards to steps that float16 holds exactly over the whole range of float32 norms.
  const double low = most > 0 ? std::floor(std::log2(least) * 8) / 8 : 0;
  const double high = most > 0 ? std::log2(most) : 0;
  const double step = std::max(std::ceil((high - low) / kSteps * 1024), 1.0) / 1024;
  for (int64_t t = 0; t < tokens; ++t) {
    const double place = std::nearbyint((std::log2(norms[t]) - low) / step);
    codes[t] = norms[t] > 0 ? static_cast<uint8_t>(std::clamp(place, 0.0, kSteps) + 1) : 0;
  }
  range[0] = low;
  range[1] = step;
}

void decode_log_norms(const uint8_t* codes, const float* range, int64_t tokens, float* norms) {
  for (int64_t t = 0; t < tokens; ++t) {
    norms[t] = codes[t] ? std::exp2(range[0] + static_cast<float>(codes[t] - 1) * range[1]) : 0;
  }
}

}  // namespace fibkv
