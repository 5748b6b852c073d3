// The codewords that can be nearest to a point, for each cell of a grid over the plane.
#pragma once

#include <cstdint>
#include <vector>

namespace fibkv {

struct CodewordGrid {
  // [side * side], row by row of the first coordinate: up to four indices below 256, rising, from the lowest byte on;
  // the last one is repeated. A cell with more candidates holds 1 and 0, falling: it refers to the whole book.
  std::vector<uint32_t> candidates;
  bool long_lists = false;
};

// codewords [size][2], size <= 256; cells cover [-extent, extent]^2 and those of the border reach outwards to
// `reach` > extent.
//
// A codeword is left out of a cell only where another one is nearer to all of it by more than float32 arithmetic errs.
CodewordGrid codeword_grid(const float* codewords, int size, int side, double extent, double reach);

}  // namespace fibkv
