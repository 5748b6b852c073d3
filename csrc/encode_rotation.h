// Rotations of kLanes vectors at a time, coordinate by coordinate, in float32 or float64.
#pragma once

#include "encode_lanes.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline vf splat_as(float x, vf) { return splat(x); }
static inline vd splat_as(double x, vd) { return splat_wide(x); }

// What the registers hold: 16 coordinates, 4 stages, with AVX-512, else 8 and 3.
constexpr int kDeepest = kLanes == 16 ? 4 : 3;

// One pass: `stages` stages of a transform, in registers, the first with butterflies of reach `span`. Returns the
// signs of the next pass.
template <int stages, class V, class S>
static const S* butterflies(V* y, int dim, int span, const S* signs) {
  constexpr int radix = 1 << stages;
  for (int start = 0; start < dim; start += radix * span, signs += radix - 1) {
    for (int i = start; i < start + span; ++i) {
      V held[radix];
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) held[r] = y[i + r * span];
      int used = 0;
#pragma GCC unroll 4
      for (int s = 0; s < stages; ++s) {
        const int reach = 1 << s;
#pragma GCC unroll 8
        for (int pair = 0; pair < radix / 2; ++pair) {
          const int low = (pair / reach) * 2 * reach + pair % reach;
          const V relative = splat_as(signs[used + pair / reach], V{});
          const V a = held[low], b = held[low + reach];
          held[low] = multiply_add(b, relative, a);
          held[low + reach] = multiply_add(-b, relative, a);
        }
        used += radix / 2 / reach;
      }
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) y[i + r * span] = held[r];
    }
  }
  return signs;
}

// Rounds of sign changes and Walsh-Hadamard transforms, in place and not normalized, with the signs of kDeepest.
template <class V, class S>
static void hadamard(const S* signs, int rounds, int dim, V* y) {
  for (int round = 0; round < rounds; ++round) {
    for (int span = 1; span < dim;) {
      int stages = 1;
      while (stages < kDeepest && (span << stages) < dim) ++stages;
      switch (stages) {
        case 1: signs = butterflies<1>(y, dim, span, signs); break;
        case 2: signs = butterflies<2>(y, dim, span, signs); break;
        case 3: signs = butterflies<3>(y, dim, span, signs); break;
        default: signs = butterflies<kDeepest>(y, dim, span, signs); break;
      }
      span <<= stages;
    }
  }
}

static inline const double* wide_signs(const Signs& signs) { return signs.wide[kDeepest - 3]; }
static inline const float* narrow_signs(const Signs& signs) { return signs.narrow[kDeepest - 3]; }

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
