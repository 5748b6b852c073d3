// Encoding and decoding of vectors: what a coder is made of, and the kernels that each instruction set offers.
//
// Letters: d dimension of a vector, k coordinates of a block, m = d / k blocks of a vector, N codewords.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "trellis_layout.h"

namespace fibkv {

// Element types of the vectors that come and go.
enum class Element { f32, f16, bf16 };

// Finds the nearest codeword of a block; all but `table` are exact, ties going to the lower index.
enum class Search {
  scalar,  // k = 1: counts the decision boundaries below
  grid,    // k = 2, N <= 256: the codewords that can be nearest in a cell of the plane
  filter,  // any: all distances by multiply-add, the ambiguous ones again exactly
  table,   // k = 2, N <= 256: the codeword of a fine cell, right or nearly right
  path,    // of a trellis: the best path of all symbols
};

// A square of side * side cells over [-extent, extent]^2; border cells go on outwards.
struct Square {
  int side;
  float extent;
  float cells_per_unit;
};

// Where a coordinate x times a factor of the scale search falls among the 256 cells of its axis: x slope / 2^16 rounded
// down, of x clamped to -limit .. limit - 1, which is -128 to 127.
struct CellScale {
  int16_t limit, slope;
};

// A Hadamard rotation in 16-bit integers; word_rotation.h has the reasons for its numbers.
struct WordRotation {
  int dim, rounds;
  float length;            // of a vector when it is rounded to integers, before its rotation
  const int32_t* factors;  // [rounds][d]: what multiplies coordinates before a transform, in both halves, in 2^-15
};

// The search by table in 16-bit integers; integer_table.cpp has the reasons for its numbers.
struct TableForm {
  WordRotation rotation;
  const CellScale* scales;   // [num_scales]
  const uint8_t* cells;      // [2^16]: codewords by 256 row + column of their cells, both signed, modulo 2^16
  const int32_t* words;      // [256]: codewords in integers, the first coordinate in the lower half
  const int8_t* planes;      // [4][256]: the bytes of `words`, from the lowest
  double along_unit, energy_unit;  // what 1 is worth in <u, q> and in <q, q>
};

// A trellis (src/fibkv/trellis.py) and how it is searched (src/fibkv/trellis_search.py).
struct TrellisForm {
  int overlap;                 // coordinates on both sides of the seam
  float cells_per_one;         // cells of the search table in the length of a unit vector
  int reach;                   // cells on both sides of 0
  const TrellisCell<2>* two;   // [2 reach + 1]: the levels of a row that are tried, or null:
  const TrellisCell<3>* three;  // then three of them
  const TrellisLayout *layout, *alternating;
};

// The form of FibQuant's codes. Pointers belong to a FibCoder.
struct FibForm {
  int dim, block, size, bits;
  int window;                  // bits that name a codeword, the index being the newest of them
  const TrellisForm* trellis;  // or null: then window = bits
  bool gain_corrected;

  // Rotation: by signs and transforms where there are any, else by the matrix [d][d], whose rows give the coordinates.
  int rounds;                // of signs and a transform; 0 for the matrix
  const int64_t* signs;      // [rounds][d]: the sign bit of float64 where it changes
  const int32_t* back_signs; // [rounds][d]: of the inverse as rounds of signs and a transform, none in the first round
  const double* matrix;
  const float* transposed;
  const WordRotation* words;  // or null: what trellis codes are rotated by instead, in integers
  float word_unit;            // what 1 is worth behind it
  double forward_scale;       // of the transforms: d^(-rounds / 2)
  const float* output_scale;  // [d]: of those of the inverse, with the signs behind them

  const float* codewords;  // [N][k]
  const float* planes;     // [k][padded]: the same by coordinate, filled up with what is never nearest
  int padded;              // N rounded up to 16
  const int8_t* pair_planes;  // k = 2, N <= 256: [2][4][256], the bytes of first and of second coordinates; or null
  const float* scores;     // [N][1 + k]: |c|^2 / 2 and -c
  float largest;           // |c| of the longest codeword

  Search search;
  const float* boundaries;     // scalar: [padded_boundaries] rising, the first x of the next level, then infinity
  int steps;                   // scalar: N <= 2^steps
  Square square;               // grid, table
  const uint32_t* candidates;  // grid: [side * side], see codeword_grid.h
  bool long_lists;             // grid: whether a cell refers to the whole book
  const uint8_t* decisions;    // table: [side * side] and 3 bytes
  const TableForm* table;      // table: or null, then it is searched with float32 coordinates

  int num_scales;       // scale search: factors tried on the unit vector; one for none
  const float* scales;

  // Inlined always: the linker must not keep a copy that was compiled for a larger instruction set.
  [[gnu::always_inline]] int blocks() const { return dim / block; }
  [[gnu::always_inline]] int code_bytes() const { return (blocks() * bits + 7) / 8; }
};

// The form of klt codes: pairs of coordinates, each with an index of its own width. Pointers belong to a KltCoder.
struct KltForm {
  int dim, heads, code_bytes;
  const uint8_t* widths;      // [heads][d / 2]: bits of each pair's index: 0, 2, 4, 6 or 8
  const double* weights;      // [heads][d / 2]: of the errors in each pair
  const FibForm* levels[5];   // by half the width: how codewords are found; null for no bits
  int num_scales;             // as of FibForm
  const float* scales;
};

// Kernels for rows of one element type. They run on the calling thread; `scratch` has `scratch_bytes`, aligned to 64.
// Those that return bool say whether all rows were finite: else what they wrote means nothing.
struct EncodeKernels {
  size_t (*scratch_bytes)(const FibForm& form);

  // rows [count][d] -> codes [count][code_bytes], norms [count], not yet rounded.
  bool (*encode_fib)(const FibForm& form, const void* rows, int64_t count, uint8_t* codes, double* norms,
                     void* scratch);

  // codes [count][code_bytes], norms [count] -> out [count][d] in the original space. float16 saturates, as below.
  void (*decode_fib)(const FibForm& form, const uint8_t* codes, const float* norms, int64_t count, void* out,
                     void* scratch);

  // The same for klt codes of one head.
  size_t (*klt_scratch_bytes)(const KltForm& form);
  bool (*encode_klt)(const KltForm& form, int head, const void* rows, int64_t count, uint8_t* codes, double* norms,
                     void* scratch);
  void (*decode_klt)(const KltForm& form, int head, const uint8_t* codes, const float* norms, int64_t count, void* out,
                     void* scratch);

  // rows [count][d] <-> values [count][d], scales [count] as bfloat16.
  bool (*encode_int8)(const void* rows, int64_t count, int dim, uint8_t* values, uint16_t* scales);
  void (*decode_int8)(const uint8_t* values, const uint16_t* scales, int64_t count, int dim, void* out);
  bool (*encode_e4m3)(const void* rows, int64_t count, int dim, uint8_t* values, uint16_t* scales);
  void (*decode_e4m3)(const uint8_t* values, const uint16_t* scales, int64_t count, int dim, void* out);

  // One group: rows [tokens][d] -> scales [d] as bfloat16, and rows / scales as float32.
  bool (*divide_channels)(const void* rows, int64_t tokens, int dim, uint16_t* scales, float* divided);

  // One group: rows [tokens][d] float32 times scales [d] -> out.
  void (*multiply_channels)(const float* rows, const uint16_t* scales, int64_t tokens, int dim, void* out);

  // One group: rows [tokens][d] -> their mean [d], not finite where a row is not.
  void (*mean_rows)(const void* rows, int64_t tokens, int dim, double* mean);

  // One group: rows [tokens][d] - taken [d] -> out [tokens][d] float32.
  void (*subtract_from_rows)(const void* rows, int64_t tokens, int dim, const float* taken, float* out);

  // One group, whatever the element type: norms [tokens] <-> codes [tokens], range [2] as float16 (log_norms.h). False:
  // a norm is beyond float32.
  bool (*encode_norms)(const double* norms, int64_t tokens, uint8_t* codes, uint16_t* range);
  void (*decode_norms)(const uint8_t* codes, const uint16_t* range, int64_t tokens, float* norms);
};

const EncodeKernels& encode_kernels(Isa isa, Element element);

}  // namespace fibkv
