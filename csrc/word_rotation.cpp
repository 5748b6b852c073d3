#include "word_rotation.h"

#include <cmath>

namespace fibkv {
namespace {

constexpr double kOne = 32768;  // of factors

double factor_of(int dim) { return std::floor(kOne / std::sqrt(dim)); }

}  // namespace

bool WordFactors::fits(int dim, int rounds) { return dim >= 8 && kMostLength + rounds * dim / 2 < INT16_MAX; }

WordFactors::WordFactors(int dim, int rounds, const int8_t* signs) : dim_(dim), rounds_(rounds) {
  for (int i = 0; i < rounds * dim; ++i) {
    const auto factor = static_cast<uint16_t>(std::lrint(signs[i] * factor_of(dim)));
    factors_.push_back(static_cast<int32_t>(factor * 0x10001u));
  }
}

double WordFactors::most() const { return kMostLength / std::sqrt(dim_); }

// The first transform makes it sqrt(d) times as long. Later rounds shorten it, by factors rounded down.
double WordFactors::growth() const {
  const double growth = std::sqrt(dim_);
  return growth * std::pow(factor_of(dim_) / kOne * growth, rounds_ - 1);
}

}  // namespace fibkv
