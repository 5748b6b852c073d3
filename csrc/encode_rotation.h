// Rotations of kLanes vectors at a time, coordinate by coordinate, in float32 or float64.
#pragma once

#include "encode_lanes.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline vf splat_as(float x, vf) { return splat(x); }
static inline vd splat_as(double x, vd) { return splat_wide(x); }

// `stages` stages of a transform at once, in registers, from the stage with blocks of 2 * span on.
template <int stages, class V, class S>
static void butterflies(V* y, int dim, int span, const S* signs, int signs_of_stage) {
  constexpr int radix = 1 << stages;
  for (int start = 0, block = 0; start < dim; start += radix * span, ++block) {
    for (int i = start; i < start + span; ++i) {
      V held[radix];
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) held[r] = y[i + r * span];
      const S* sign = signs;
      int per_stage = signs_of_stage;
#pragma GCC unroll 4
      for (int s = 0; s < stages; ++s) {
        const int reach = 1 << s;
        const S* mine = sign + (radix >> (s + 1)) * block;
#pragma GCC unroll 8
        for (int pair = 0; pair < radix / 2; ++pair) {
          const int low = (pair / reach) * 2 * reach + pair % reach;
          const V relative = splat_as(mine[pair / reach], V{});
          const V a = held[low], b = held[low + reach];
          held[low] = multiply_add(b, relative, a);
          held[low + reach] = multiply_add(-b, relative, a);
        }
        sign += per_stage;
        per_stage /= 2;
      }
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) y[i + r * span] = held[r];
    }
  }
}

// Rounds of sign changes and Walsh-Hadamard transforms, in place and not normalized; see Signs. `signs` are those of
// the element type S.
template <class V, class S>
static void hadamard(const S* signs, int rounds, int dim, V* y) {
  // What the registers hold: 16 of them are one pass of 4 stages with AVX-512, of 3 without.
  constexpr int most = kLanes == 16 ? 4 : 3;
  for (int round = 0; round < rounds; ++round) {
    int span = 1;
    while (span < dim) {
      const int of_stage = dim / (2 * span);
      int stages = 0;
      while (stages < most && (span << stages) < dim) ++stages;
      switch (stages) {
        case 1: butterflies<1>(y, dim, span, signs, of_stage); break;
        case 2: butterflies<2>(y, dim, span, signs, of_stage); break;
        case 3: butterflies<3>(y, dim, span, signs, of_stage); break;
        default: butterflies<most>(y, dim, span, signs, of_stage); break;
      }
      for (int s = 0; s < stages; ++s) signs += of_stage >> s;
      span <<= stages;
    }
  }
}

// y = M x with a matrix [d][d] by rows.
template <class V, class S>
static void multiply(const S* matrix, int dim, const V* x, V* y) {
  constexpr int rows = 8;
  int i = 0;
  for (; i + rows <= dim; i += rows) {
    V sum[rows] = {};
    for (int j = 0; j < dim; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        sum[r] = multiply_add(x[j], splat_as(matrix[(int64_t)(i + r) * dim + j], V{}), sum[r]);
      }
    }
    for (int r = 0; r < rows; ++r) y[i + r] = sum[r];
  }
  for (; i < dim; ++i) {
    V sum{};
    for (int j = 0; j < dim; ++j) sum = multiply_add(x[j], splat_as(matrix[(int64_t)i * dim + j], V{}), sum);
    y[i] = sum;
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
