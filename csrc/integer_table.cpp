#include "integer_table.h"

#include <algorithm>
#include <cmath>

namespace fibkv {
namespace {

constexpr int kSide = 256, kCells = kSide * kSide;

// How long the integer codewords of a vector may be together, so that <x, q> and <q, q> stay below 2^31.
constexpr double kMostQuantized = 46000;

// The slope of cells that reach to `extent`.
double slope_of(double extent) { return kSide / 2 * 65536 / extent; }

uint32_t word(double x) { return static_cast<uint16_t>(std::lrint(x)); }

}  // namespace

bool IntegerTable::fits(const FibForm& form) {
  const double stretch = *std::max_element(form.scales, form.scales + form.num_scales);
  return WordFactors::fits(form.dim, form.rounds) && form.square.side == kSide &&
         1.01 * stretch * slope_of(form.square.extent * WordFactors::kMostLength) < INT16_MAX;
}

IntegerTable::IntegerTable(const FibForm& form, const int8_t* signs) : factors_(form.dim, form.rounds, signs) {
  // The longest vectors for which the slope is whole.
  const double slope = std::ceil(slope_of(form.square.extent * factors_.most() * factors_.growth()));
  const double length = slope_of(form.square.extent) / slope;
  form_.rotation = factors_.form(length / factors_.growth());
  place_cells(form, slope);
  round_codewords(form, length);
}

void IntegerTable::place_cells(const FibForm& form, double slope) {
  for (int s = 0; s < form.num_scales; ++s) {
    const double scaled = std::nearbyint(slope * form.scales[s]);
    const double limit = std::min<double>(slope_of(1) / scaled, INT16_MAX);
    scales_.push_back({static_cast<int16_t>(limit), static_cast<int16_t>(scaled)});
  }
  for (int i = 0; i < kCells; ++i) cells_.push_back(form.decisions[(i + kCells / 2 + kSide / 2) % kCells]);
  form_.scales = scales_.data();
  form_.cells = cells_.data();
}

void IntegerTable::round_codewords(const FibForm& form, double length) {
  const double unit = kMostQuantized / (std::sqrt(form.blocks()) * form.largest);
  words_.resize(256);
  planes_.resize(4 * 256);
  for (int j = 0; j < form.size; ++j) {
    const uint32_t both = word(form.codewords[2 * j] * unit) | word(form.codewords[2 * j + 1] * unit) << 16;
    words_[j] = static_cast<int32_t>(both);
    for (int byte = 0; byte < 4; ++byte) planes_[256 * byte + j] = static_cast<int8_t>(both >> (8 * byte));
  }
  form_.words = words_.data();
  form_.planes = planes_.data();
  form_.along_unit = 1 / (length * unit);
  form_.energy_unit = 1 / (unit * unit);
}

}  // namespace fibkv
