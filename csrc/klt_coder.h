// What the kernels of klt codes need beside the vectors, made once from an allocation.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "fib_coder.h"

namespace fibkv {

class KltCoder {
 public:
  // `widths` and `weights` [heads][dim / 2]; `levels` are coders of pairs for indices of 2, 4, 6 and 8 bits, which must
  // outlive this.
  KltCoder(int dim, int heads, const uint8_t* widths, const double* weights, std::array<const FibCoder*, 4> levels,
           std::vector<float> scales)
      : widths_(widths, widths + heads * (dim / 2)), weights_(weights, weights + heads * (dim / 2)),
        scales_(std::move(scales)) {
    int bits = 0;
    for (int pair = 0; pair < dim / 2; ++pair) bits += widths_[pair];
    form_ = {dim, heads, (bits + 7) / 8, widths_.data(), weights_.data(), {}, static_cast<int>(scales_.size()),
             scales_.data()};
    for (size_t i = 0; i < levels.size(); ++i) form_.levels[i + 1] = &levels[i]->form();
  }
  KltCoder(const KltCoder&) = delete;
  KltCoder& operator=(const KltCoder&) = delete;

  const KltForm& form() const { return form_; }

 private:
  KltForm form_{};
  std::vector<uint8_t> widths_;
  std::vector<double> weights_;
  std::vector<float> scales_;
};

}  // namespace fibkv
