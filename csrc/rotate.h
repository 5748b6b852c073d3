// Rotating the queries and un-rotating the outputs of a step: rows of padded_dim floats.
#pragma once

#include "attend_kernels.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

// y = matrix x for n rows; `columns` is the matrix column by column.
// A strip of the outputs of `transform` for a few rows, which stays in registers while the columns pass once.
template <int rows, int vectors>
void transform_strip(const float* columns, int dim, const float* x, float* y, int width) {
  vf sums[rows][vectors] = {};
  for (int j = 0; j < dim; ++j) {
    for (int v = 0; v < vectors; ++v) {
      const vf column = load<vf>(columns + static_cast<size_t>(j) * dim + v * kLanes);
      for (int row = 0; row < rows; ++row) sums[row][v] += splat(x[row * width + j]) * column;
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) store(y + row * width + v * kLanes, sums[row][v]);
  }
}

template <int rows>
void transform_rows(const float* columns, int dim, const float* x, float* y, int width) {
  constexpr int vectors = 4;
  int i = 0;
  for (; i + vectors * kLanes <= dim; i += vectors * kLanes) {
    transform_strip<rows, vectors>(columns + i, dim, x, y + i, width);
  }
  for (; i + kLanes <= dim; i += kLanes) transform_strip<rows, 1>(columns + i, dim, x, y + i, width);
  for (; i < width; ++i) {
    for (int row = 0; row < rows; ++row) {
      float sum = 0;
      for (int j = 0; i < dim && j < dim; ++j) sum += x[row * width + j] * columns[static_cast<size_t>(j) * dim + i];
      y[row * width + i] = sum;
    }
  }
}

inline void transform(const float* columns, int dim, const float* x, int n, float* y) {
  const int width = padded_dim(dim);
  int row = 0;
  for (; row + 4 <= n; row += 4) transform_rows<4>(columns, dim, x + row * width, y + row * width, width);
  for (; row < n; ++row) transform_rows<1>(columns, dim, x + row * width, y + row * width, width);
}

// The Walsh-Hadamard transform, in natural order and without its factor, of rows that fit into registers.
template <int dim>
struct Hadamard {
  static constexpr int count = dim / kLanes;

  // One stage inside a vector: lane i meets lane i ^ span.
  template <int span>
  static vf meet(vf x) { return meet<span>(x, std::make_integer_sequence<int, kLanes>{}); }
  template <int span, int... i>
  static vf meet(vf x, std::integer_sequence<int, i...>) {
    return pick<(i ^ span)...>(x, x) + vf{(i & span ? -1.0f : 1.0f)...} * x;
  }

  static void apply(vf (&v)[count]) {
    for (int span = 1; span < count; span *= 2) {
      for (int i = 0; i < count; ++i) {
        if (i & span) continue;
        const vf a = v[i], b = v[i + span];
        v[i] = a + b;
        v[i + span] = a - b;
      }
    }
    for (int i = 0; i < count; ++i) {
      v[i] = meet<2>(meet<1>(v[i]));
      if constexpr (kLanes >= 8) v[i] = meet<4>(v[i]);
      if constexpr (kLanes >= 16) v[i] = meet<8>(v[i]);
    }
  }

  static void change_signs(vf (&v)[count], const float* signs) {
    for (int i = 0; i < count; ++i) v[i] *= load<vf>(signs + i * kLanes);
  }

  static void row(const Rotation& rotation, bool forward, const float* x, float* y) {
    vf v[count];
    float factor = 1.0f;
    for (int i = 0; i < count; ++i) v[i] = load<vf>(x + i * kLanes);
    for (int r = 0; r < rotation.rounds; ++r) {
      if (forward) change_signs(v, rotation.signs + r * dim);
      apply(v);
      if (!forward) change_signs(v, rotation.signs + (rotation.rounds - 1 - r) * dim);
      // Two rounds multiply by dim; the number of rounds is even.
      if (r % 2) factor /= dim;
    }
    for (int i = 0; i < count; ++i) store(y + i * kLanes, v[i] * splat(factor));
  }

  static void rows(const Rotation& rotation, bool forward, const float* x, int n, float* y) {
    for (int q = 0; q < n; ++q) row(rotation, forward, x + q * dim, y + q * dim);
  }
};

inline void turn(const Rotation& rotation, bool forward, const float* x, int n, float* y) {
  if (rotation.signs && rotation.dim == 32) return Hadamard<32>::rows(rotation, forward, x, n, y);
  if (rotation.signs && rotation.dim == 64) return Hadamard<64>::rows(rotation, forward, x, n, y);
  if (rotation.signs && rotation.dim == 128) return Hadamard<128>::rows(rotation, forward, x, n, y);
  if (rotation.signs && rotation.dim == 256) return Hadamard<256>::rows(rotation, forward, x, n, y);
  transform(forward ? rotation.transposed : rotation.matrix, rotation.dim, x, n, y);
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
