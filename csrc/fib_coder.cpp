#include "fib_coder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "codeword_grid.h"

namespace fibkv {
namespace {

constexpr int kPadding = 16;  // the most lanes that an instruction set has
constexpr int kGridSide = 128;
constexpr float kNeverNearest = 1e18f;  // squared it is still a float32

// Whether float32 arithmetic finds level `b` nearer to x than level `a`, the lower index winning ties.
bool above(float x, float a, float b) {
  const float to_a = x - a, to_b = x - b;
  return to_b * to_b < to_a * to_a;
}

// The first float32 of (a, b] that is nearer to b. Between two levels the answer changes once.
float boundary(float a, float b) {
  float low = a, high = b;
  while (true) {
    const float middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (above(middle, a, b) ? high : low) = middle;
  }
  return high;
}

}  // namespace

FibCoder::FibCoder(const FibSettings& settings) {
  take(settings);
  form_.window = form_.bits;
  lay_out_codewords();
  if (form_.block == 2 && form_.size <= 256) lay_out_pairs();
  choose_search(settings);
}

FibCoder::FibCoder(const FibSettings& settings, const TrellisSettings& trellis)
    : layout_(TrellisLayout(settings.bits, trellis.label_columns, false)),
      alternating_(TrellisLayout(settings.bits, trellis.label_columns, true)) {
  take(settings);
  lay_out_cells(trellis);
  trellis_.overlap = trellis.overlap;
  trellis_.cells_per_one = trellis.cells_per_one;
  trellis_.reach = trellis.reach;
  trellis_.layout = &*layout_;
  trellis_.alternating = &*alternating_;
  form_.window = 2 * form_.bits + static_cast<int>(trellis.label_columns.size());
  form_.trellis = &trellis_;
  form_.search = Search::path;
  if (trellis.word_length > 0) {
    words_ = factors_.emplace(settings.dim, settings.rounds, settings.signs).form(trellis.word_length);
    form_.words = &words_;
    form_.word_unit = trellis.word_unit;
  }
}

void FibCoder::lay_out_cells(const TrellisSettings& trellis) {
  const int cells = 2 * trellis.reach + 1;
  if (trellis.ways == 2) {
    two_ = trellis_cells<2>(form_.bits, cells, trellis.rows, trellis.columns, trellis.costs);
    trellis_.two = two_.data();
  } else {
    three_ = trellis_cells<3>(form_.bits, cells, trellis.rows, trellis.columns, trellis.costs);
    trellis_.three = three_.data();
  }
}

void FibCoder::take(const FibSettings& settings) {
  form_.dim = settings.dim;
  form_.block = settings.block;
  form_.size = settings.size;
  form_.bits = settings.bits;
  form_.gain_corrected = settings.gain_corrected;
  codewords_.assign(settings.codewords, settings.codewords + static_cast<size_t>(settings.size) * settings.block);
  form_.codewords = codewords_.data();
  scales_ = settings.scales;
  form_.scales = scales_.data();
  form_.num_scales = static_cast<int>(scales_.size());
  if (settings.signs) {
    rotate_by_signs(settings.signs, settings.rounds);
  } else {
    rotate_by_matrix(settings.matrix);
  }
}

void FibCoder::rotate_by_signs(const int8_t* signs, int rounds) {
  const int d = form_.dim;
  form_.rounds = rounds;
  for (int i = 0; i < rounds * d; ++i) signs_.push_back(signs[i] < 0 ? INT64_MIN : 0);
  form_.signs = signs_.data();
  // The inverse: transforms first, then signs, from the last round to the first. Read as "signs, then a transform",
  // its first round changes no sign, and the signs of round 0 go to the output.
  back_signs_.assign(d, 0);
  for (int round = rounds - 1; round > 0; --round) {
    for (int i = 0; i < d; ++i) back_signs_.push_back(signs[round * d + i] < 0 ? INT32_MIN : 0);
  }
  form_.back_signs = back_signs_.data();
  form_.forward_scale = std::pow(d, -0.5 * rounds);
  for (int i = 0; i < d; ++i) output_scale_.push_back(static_cast<float>(form_.forward_scale * signs[i]));
  form_.output_scale = output_scale_.data();
}

void FibCoder::rotate_by_matrix(const float* matrix) {
  const size_t d = form_.dim;
  matrix_.assign(matrix, matrix + d * d);
  transposed_.resize(d * d);
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j < d; ++j) transposed_[j * d + i] = matrix[i * d + j];
  }
  form_.matrix = matrix_.data();
  form_.transposed = transposed_.data();
  form_.forward_scale = 1;
}

void FibCoder::lay_out_codewords() {
  const int k = form_.block;
  form_.padded = (form_.size + kPadding - 1) / kPadding * kPadding;
  planes_.assign(static_cast<size_t>(form_.padded) * k, kNeverNearest);
  for (int j = 0; j < form_.size; ++j) {
    const float* word = form_.codewords + static_cast<size_t>(j) * k;
    double energy = 0;
    for (int i = 0; i < k; ++i) energy += static_cast<double>(word[i]) * word[i];
    scores_.push_back(static_cast<float>(energy / 2));
    for (int i = 0; i < k; ++i) {
      scores_.push_back(-word[i]);
      planes_[static_cast<size_t>(i) * form_.padded + j] = word[i];
    }
    form_.largest = std::max(form_.largest, static_cast<float>(std::sqrt(energy)));
  }
  form_.planes = planes_.data();
  form_.scores = scores_.data();
}

void FibCoder::lay_out_pairs() {
  pair_planes_.resize(2 * 4 * 256);
  for (int j = 0; j < form_.size; ++j) {
    for (int axis = 0; axis < 2; ++axis) {
      uint32_t bits;
      std::memcpy(&bits, form_.codewords + 2 * j + axis, sizeof bits);
      for (int byte = 0; byte < 4; ++byte) {
        pair_planes_[(4 * axis + byte) * 256 + j] = static_cast<int8_t>(bits >> (8 * byte));
      }
    }
  }
  form_.pair_planes = pair_planes_.data();
}

void FibCoder::choose_search(const FibSettings& settings) {
  form_.search = Search::filter;
  if (settings.decisions) {
    const size_t cells = static_cast<size_t>(settings.side) * settings.side;
    decisions_.assign(settings.decisions, settings.decisions + cells);
    decisions_.resize(cells + 3);
    form_.decisions = decisions_.data();
    form_.square = {settings.side, settings.extent, static_cast<float>(settings.side / (2.0 * settings.extent))};
    form_.search = Search::table;
    if (settings.signs && IntegerTable::fits(form_)) {
      form_.table = &integers_.emplace(form_, settings.signs).form();
    }
  } else if (form_.block == 1 && find_boundaries()) {
    form_.search = Search::scalar;
  } else if (form_.block == 2 && form_.size <= 256) {
    const float extent = *std::max_element(codewords_.begin(), codewords_.end(),
                                           [](float a, float b) { return std::abs(a) < std::abs(b); });
    const float reach = std::abs(extent);
    form_.square = {kGridSide, reach, static_cast<float>(kGridSide / (2.0 * reach))};
    // The scale search multiplies what is coded.
    const float stretch = *std::max_element(scales_.begin(), scales_.end());
    CodewordGrid grid = codeword_grid(form_.codewords, form_.size, kGridSide, reach, reach + 1.01 * stretch * settings.farthest);
    candidates_ = std::move(grid.candidates);
    form_.candidates = candidates_.data();
    form_.long_lists = grid.long_lists;
    form_.search = Search::grid;
  }
}

// False where the levels do not rise.
bool FibCoder::find_boundaries() {
  for (int j = 0; j + 1 < form_.size; ++j) {
    if (!(form_.codewords[j] < form_.codewords[j + 1])) return false;
    boundaries_.push_back(boundary(form_.codewords[j], form_.codewords[j + 1]));
  }
  while ((1 << form_.steps) < form_.size) ++form_.steps;
  boundaries_.resize(size_t{1} << form_.steps, std::numeric_limits<float>::infinity());
  form_.boundaries = boundaries_.data();
  return true;
}

}  // namespace fibkv
