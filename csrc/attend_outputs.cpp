#include "attend_outputs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "index.h"
#include "row_forms.h"

namespace fibkv {
namespace {

const Running* running_of(const Found& found, int split) {
  return found.partials[split].running.data() + static_cast<size_t>(found.head) * found.queries;
}

// The reference points of all splits together, the sums relative to them, and the factors [splits][queries] that take
// each split's sums there.
void weigh(const Found& found, float* top, float* sum, float* shares) {
  const int n = found.queries;
  std::fill_n(top, n, kNothing);
  std::fill_n(sum, n, 0.0f);
  for (int split = 0; split < found.splits; ++split) {
    const Running* running = running_of(found, split);
    for (int i = 0; i < n; ++i) top[i] = std::max(top[i], running[i].top);
  }
  for (int split = 0; split < found.splits; ++split, shares += n) {
    const Running* running = running_of(found, split);
    for (int i = 0; i < n; ++i) {
      shares[i] = top[i] == kNothing ? 0.0f : std::exp(running[i].top - top[i]);
      sum[i] += shares[i] * std::accumulate(running[i].sums, running[i].sums + kPad, 0.0f);
    }
  }
}

}  // namespace

Outputs::Outputs(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Output& out)
    : k_(kernels), out_(out), width_(padded_dim(out.value_dim)) {
  for (const Run* run : runs) {
    add_once(sides_, run->value);
    add_once(spaces_, run->value->space());
  }
}

int Outputs::side_of(const Run& run) const { return index_of(sides_, run.value); }

void Outputs::write(const Found& found, size_t row, std::vector<float>& scratch) const {
  const int n = found.queries, size = n * width_;
  scratch.resize(std::max<size_t>(scratch.size(), 4 * size + (2 + found.splits) * n));
  float *whole = scratch.data(), *merged = whole + size, *inside = merged + size, *turned = inside + size;
  float *top = turned + size, *sum = top + n, *shares = sum + n;
  weigh(found, top, sum, shares);
  std::fill_n(whole, size, 0.0f);
  for (const Rotation* space : spaces_) {
    std::fill_n(inside, size, 0.0f);
    for (int side = 0; side < sides(); ++side) {
      if (sides_[side]->space() != space) continue;
      merge_side(found, side, shares, merged);
      k_.finish(*sides_[side], merged, n, inside);
    }
    if (space) k_.unrotate(*space, inside, n, turned);
    k_.add_scaled(whole, space ? turned : inside, size, 1.0f);
  }
  for (int i = 0; i < n; ++i, whole += width_) {
    k_.scale(whole, width_, sum[i] > 0 ? 1.0f / sum[i] : 0.0f);
    write_row(out_.form, whole, out_.value_dim, element_at(out_.rows, out_.form, (row + i) * out_.value_dim));
    out_.lse[row + i] = sum[i] > 0 ? top[i] + std::log(sum[i]) : kNothing;
  }
}

// The sums of one side over all splits.
void Outputs::merge_side(const Found& found, int side, const float* shares, float* merged) const {
  const int n = found.queries;
  std::fill_n(merged, static_cast<size_t>(n) * width_, 0.0f);
  for (int split = 0; split < found.splits; ++split, shares += n) {
    const Partial& partial = found.partials[split];
    if (!partial.used[side]) continue;
    const size_t first = (static_cast<size_t>(side) * found.heads + found.head) * n;
    for (int i = 0; i < n; ++i) {
      k_.add_scaled(merged + static_cast<size_t>(i) * width_, partial.outs.data() + (first + i) * width_, width_, shares[i]);
    }
  }
}

}  // namespace fibkv
