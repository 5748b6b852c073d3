// What the search by table needs in 16-bit integers, made once from a codebook, its decision table and a rotation.
#pragma once

#include <cstdint>
#include <vector>

#include "encode.h"
#include "word_rotation.h"

namespace fibkv {

class IntegerTable {
 public:
  // Whether 16 bits hold the rotation and tell the cells apart.
  static bool fits(const FibForm& form);

  // `form` has everything but the signs [rounds][d] of its rotation.
  IntegerTable(const FibForm& form, const int8_t* signs);
  IntegerTable(const IntegerTable&) = delete;
  IntegerTable& operator=(const IntegerTable&) = delete;

  const TableForm& form() const { return form_; }

 private:
  void place_cells(const FibForm& form, double slope);
  void round_codewords(const FibForm& form, double length);

  TableForm form_{};
  WordFactors factors_;
  std::vector<int32_t> words_;
  std::vector<CellScale> scales_;
  std::vector<uint8_t> cells_;
  std::vector<int8_t> planes_;
};

}  // namespace fibkv
