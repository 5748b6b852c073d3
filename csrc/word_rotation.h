// A Hadamard rotation in 16-bit integers, made once from its signs. Meaning: src/fibkv/word_rotation.py.
#pragma once

#include <cstdint>
#include <vector>

#include "encode.h"

namespace fibkv {

class WordFactors {
 public:
  // How long a vector may be after the first round's transform, rounding not counted. Later factors are at most
  // 1 / sqrt(d), so it grows by roundings alone: each round begins with some of at most 1/2 in d coordinates, a vector
  // of sqrt(d) / 2 or less that the transform makes d / 2. Within a transform vectors are shorter than behind it, and no
  // coordinate is longer than its vector: where what follows stays below 2^15, nothing can wrap.
  static constexpr double kMostLength = 31900;

  // Whether 16 bits hold such a rotation of vectors of `dim` coordinates.
  static bool fits(int dim, int rounds);

  // signs [rounds][d]
  WordFactors(int dim, int rounds, const int8_t* signs);

  // How long a vector may be when it is rounded to integers.
  double most() const;

  // How many times as long it is behind the rotation.
  double growth() const;

  // The form for vectors of a length; it points into this object.
  WordRotation form(double length) const { return {dim_, rounds_, static_cast<float>(length), factors_.data()}; }

 private:
  int dim_, rounds_;
  std::vector<int32_t> factors_;
};

}  // namespace fibkv
