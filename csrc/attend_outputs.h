// The outputs of a step: what its tasks found, merged by log-sum-exp and taken back to the original space.
#pragma once

#include <cstddef>
#include <vector>

#include "attend.h"

namespace fibkv {

constexpr float kNothing = -__builtin_inff();  // the reference point of a query that has seen no token

// What one task found for its queries.
struct Partial {
  std::vector<float> outs;       // [value sides][heads][queries][width], each in its side's own order
  std::vector<bool> used;        // [value sides]
  std::vector<Running> running;  // [heads][queries]
};

// The queries of one head of a task, among what every split of the context found for them.
struct Found {
  const Partial* partials;  // [splits]
  int splits;
  int heads, head;  // of the task
  int queries;
};

class Outputs {
 public:
  Outputs(const AttendKernels& kernels, const std::vector<const Run*>& runs, const Output& out);

  int width() const { return width_; }
  int sides() const { return static_cast<int>(sides_.size()); }
  int side_of(const Run& run) const;

  // Writes the outputs of queries found, whose rows are those from `row` on; `scratch` is a thread's own.
  void write(const Found& found, size_t row, std::vector<float>& scratch) const;

 private:
  void merge_side(const Found& found, int side, const float* shares, float* merged) const;

  const AttendKernels& k_;
  const Output& out_;
  int width_;
  std::vector<const Side*> sides_;
  std::vector<const Rotation*> spaces_;
};

}  // namespace fibkv
