#include "integer_table.h"

#include <algorithm>
#include <cmath>

namespace fibkv {
namespace {

constexpr int kSide = 256, kCells = kSide * kSide;
constexpr double kOne = 32768;  // of factors

// How long a vector may be after the first round's transform, rounding not counted. Later factors are at most
// 1 / sqrt(d), so it grows by roundings alone: each round begins with some of at most 1/2 in d coordinates, a vector of
// sqrt(d) / 2 or less that the transform makes d / 2. Within a transform vectors are shorter than behind it, and no
// coordinate is longer than its vector: where what follows stays below 2^15, nothing can wrap.
constexpr double kMostLength = 31900;

// How long the integer codewords of a vector may be together, so that <x, q> and <q, q> stay below 2^31.
constexpr double kMostQuantized = 46000;

// The slope of cells that reach to `extent`.
double slope_of(double extent) { return kSide / 2 * 65536 / extent; }

uint32_t word(double x) { return static_cast<uint16_t>(std::lrint(x)); }

}  // namespace

bool IntegerTable::fits(const FibForm& form) {
  const double stretch = *std::max_element(form.scales, form.scales + form.num_scales);
  return form.dim >= 8 && kMostLength + form.rounds * form.dim / 2 < INT16_MAX && form.square.side == kSide &&
         1.01 * stretch * slope_of(form.square.extent * kMostLength) < INT16_MAX;
}

IntegerTable::IntegerTable(const FibForm& form, const int8_t* signs) {
  const int rounds = form.rounds;
  const double growth = std::sqrt(form.dim), factor = std::floor(kOne / growth);
  for (int i = 0; i < rounds * form.dim; ++i) {
    factors_.push_back(static_cast<int32_t>(word(signs[i] * factor) * 0x10001u));
  }
  form_.factors = factors_.data();

  // Rounds but the first shorten a vector to this share. Its length is the most for which the slope is whole.
  const double kept = std::pow(factor / kOne * growth, rounds - 1);
  const double slope = std::ceil(slope_of(form.square.extent * kMostLength * kept));
  const double length = slope_of(form.square.extent) / slope;
  form_.length = static_cast<float>(length / (kept * growth));
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
