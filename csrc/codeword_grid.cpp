#include "codeword_grid.h"

#include <algorithm>
#include <cmath>

namespace fibkv {
namespace {

// Squared distances in float32 err by 4 roundings of 2^-24 each, relative to themselves.
constexpr double kMargin = 2e-6;
// Points are put into cells in float32, which errs by far less than this part of a cell.
constexpr double kOverlap = 1e-3;
constexpr uint32_t kWholeBook = 0x00000001;

struct Rectangle {
  double low[2], high[2];
};

class Builder {
 public:
  Builder(const float* codewords, int size, int side, double extent, double reach)
      : codewords_(codewords), side_(side), extent_(extent), reach_(reach), width_(2 * extent / side) {
    grid_.candidates.resize(static_cast<size_t>(side) * side);
    std::vector<int> all(size);
    for (int i = 0; i < size; ++i) all[i] = i;
    fill(0, 0, side, all);
  }

  CodewordGrid take() { return std::move(grid_); }

 private:
  // The square of `span` cells from (row, column) on, of which `among` holds all candidates.
  void fill(int row, int column, int span, const std::vector<int>& among) {
    const std::vector<int> found = candidates(rectangle(row, column, span), among);
    if (span == 1) {
      grid_.candidates[static_cast<size_t>(row) * side_ + column] = packed(found);
      return;
    }
    const int half = span / 2;
    for (int r : {row, row + half}) {
      for (int c : {column, column + half}) fill(r, c, half, found);
    }
  }

  Rectangle rectangle(int row, int column, int span) const {
    Rectangle area;
    const int first[2] = {row, column};
    for (int axis = 0; axis < 2; ++axis) {
      const int last = first[axis] + span;
      area.low[axis] = first[axis] == 0 ? -reach_ : -extent_ + (first[axis] - kOverlap) * width_;
      area.high[axis] = last == side_ ? reach_ : -extent_ + (last + kOverlap) * width_;
    }
    return area;
  }

  std::vector<int> candidates(const Rectangle& area, const std::vector<int>& among) const {
    // First what is farther from every point of the area than one codeword is from any.
    double bound = INFINITY;
    for (int i : among) bound = std::min(bound, farthest(area, i));
    std::vector<int> close;
    for (int i : among) {
      if (nearest(area, i) <= bound * (1 + kMargin)) close.push_back(i);
    }
    std::vector<int> found;
    for (int i : close) {
      const bool beaten = std::any_of(close.begin(), close.end(), [&](int j) { return dominates(area, j, i); });
      if (!beaten) found.push_back(i);
    }
    return found;
  }

  // Whether codeword j is nearer than i to every point. The difference of two squared distances is linear: its
  // smallest value is at a corner.
  bool dominates(const Rectangle& area, int j, int i) const {
    if (i == j) return false;
    const double margin = kMargin * farthest(area, j);
    for (double x : {area.low[0], area.high[0]}) {
      for (double y : {area.low[1], area.high[1]}) {
        if (distance(x, y, i) - distance(x, y, j) <= margin) return false;
      }
    }
    return true;
  }

  double distance(double x, double y, int i) const {
    const double dx = x - codewords_[2 * i], dy = y - codewords_[2 * i + 1];
    return dx * dx + dy * dy;
  }

  double farthest(const Rectangle& area, int i) const {
    double sum = 0;
    for (int axis = 0; axis < 2; ++axis) {
      const double c = codewords_[2 * i + axis];
      const double far = std::max(std::abs(c - area.low[axis]), std::abs(c - area.high[axis]));
      sum += far * far;
    }
    return sum;
  }

  double nearest(const Rectangle& area, int i) const {
    double sum = 0;
    for (int axis = 0; axis < 2; ++axis) {
      const double c = codewords_[2 * i + axis];
      const double near = std::max({area.low[axis] - c, c - area.high[axis], 0.0});
      sum += near * near;
    }
    return sum;
  }

  uint32_t packed(const std::vector<int>& found) {
    if (found.size() > 4) {
      grid_.long_lists = true;
      return kWholeBook;
    }
    uint32_t list = 0;
    for (size_t slot = 0; slot < 4; ++slot) {
      list |= static_cast<uint32_t>(found[std::min(slot, found.size() - 1)]) << (8 * slot);
    }
    return list;
  }

  const float* codewords_;
  int side_;
  double extent_, reach_, width_;
  CodewordGrid grid_;
};

}  // namespace

CodewordGrid codeword_grid(const float* codewords, int size, int side, double extent, double reach) {
  return Builder(codewords, size, side, extent, reach).take();
}

}  // namespace fibkv
