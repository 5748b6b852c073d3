// What the kernels of FibQuant need beside the vectors, made once from a codebook and a rotation.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "encode.h"
#include "integer_table.h"

namespace fibkv {

// As Python describes it; pointers are read by the constructor only.
struct FibSettings {
  int dim, block, size, bits;
  bool gain_corrected;
  const float* codewords;         // [N][k], of a trellis those of all windows
  const float* matrix;            // [d][d]: the rotation
  const int8_t* signs;            // [rounds][d] of a Hadamard rotation, or null: then the matrix is multiplied with
  int rounds;
  const uint8_t* decisions;       // [side][side], or null: then the search is exact
  int side;
  float extent;
  std::vector<float> scales;      // of the scale search; one for none
  float farthest = 1;             // the largest coordinate of what is coded: 1 for unit vectors
};

// Of a trellis; see TrellisForm. Pointers as above.
struct TrellisSettings {
  int overlap;
  float cells_per_one;
  float word_length;          // of vectors that are rotated in integers; 0 where they are not
  float word_unit;
  int reach, ways, rows;      // of the search table: cells on both sides of 0, levels tried, rows of labels
  const uint8_t* columns;     // [2 reach + 1][ways][rows]
  const uint8_t* costs;       // likewise
  std::vector<int> label_columns;  // what each middle bit of a window adds to a label, from the oldest
};

class FibCoder {
 public:
  explicit FibCoder(const FibSettings& settings);
  // Of a trellis code, with blocks of one coordinate.
  FibCoder(const FibSettings& settings, const TrellisSettings& trellis);
  FibCoder(const FibCoder&) = delete;
  FibCoder& operator=(const FibCoder&) = delete;

  const FibForm& form() const { return form_; }

 private:
  void rotate_by_signs(const int8_t* signs, int rounds);
  void rotate_by_matrix(const float* matrix);
  void take(const FibSettings& settings);
  void lay_out_cells(const TrellisSettings& trellis);
  void lay_out_codewords();
  void lay_out_pairs();
  void choose_search(const FibSettings& settings);
  bool find_boundaries();

  FibForm form_{};
  TrellisForm trellis_{};
  std::optional<TrellisLayout> layout_, alternating_;
  std::optional<IntegerTable> integers_;
  std::optional<WordFactors> factors_;
  WordRotation words_{};
  std::vector<TrellisCell<2>> two_;
  std::vector<TrellisCell<3>> three_;
  std::vector<int64_t> signs_;
  std::vector<int32_t> back_signs_;
  std::vector<double> matrix_;
  std::vector<float> transposed_, output_scale_;
  std::vector<float> codewords_, planes_, scores_, boundaries_, scales_;
  std::vector<uint32_t> candidates_;
  std::vector<int8_t> pair_planes_;
  std::vector<uint8_t> decisions_;
};

}  // namespace fibkv
