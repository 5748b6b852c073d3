#include "log_norms.h"

#include <algorithm>
#include <cmath>

namespace fibkv {

LogRange log_range(double least, double most) {
  // Rounded outwards to steps that float16 holds exactly over the whole range of float32 norms.
  const double low = most > 0 ? std::floor(std::log2(least) * 8) / 8 : 0;
  const double high = most > 0 ? std::log2(most) : 0;
  return {low, std::max(std::ceil((high - low) / kLogSteps * 1024), 1.0) / 1024};
}

uint8_t log_norm(double norm, const LogRange& range) {
  if (!(norm > 0)) return 0;
  const double place = std::nearbyint((std::log2(norm) - range.low) / range.step);
  return static_cast<uint8_t>(std::clamp<double>(place, 0, kLogSteps) + 1);
}

}  // namespace fibkv
