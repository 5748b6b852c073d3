// Rotations, coordinate by coordinate: of kLanes vectors at a time in float32 or float64, of twice as many in words.
#pragma once

#include "encode_words.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline vf splat_as(float x, vf) { return splat(x); }
static inline vd splat_as(double x, vd) { return splat_wide(x); }

// Steps of a rotation: a + b and a - b, and what begins a round. The difference is a multiply-add, exact as the factor is
// 1, since additions have units of their own on some processors.
template <class V>
static inline void butterfly(V& a, V& b) {
  const V sum = a + b;
  b = subtract_as_product(a, b);
  a = sum;
}
template <class V, class S>
static inline V turned(V v, S sign) {
  return v * splat_as(sign, V{});
}

// One pass: `stages` stages of a transform in registers, the first with butterflies of reach `span`. One that turns ends
// a round there and begins the next one: factors [d] multiply, and the same stages follow once more.
template <int stages, bool turns, class V, class Factor>
static void pass(V* x, int dim, int span, const Factor* factors) {
  constexpr int radix = 1 << stages;
  const auto transform = [](V* held) {
#pragma GCC unroll 4
    for (int s = 0; s < stages; ++s) {
      const int reach = 1 << s;
#pragma GCC unroll 8
      for (int pair = 0; pair < radix / 2; ++pair) {
        const int low = pair / reach * 2 * reach + pair % reach;
        butterfly(held[low], held[low + reach]);
      }
    }
  };
  for (int start = 0; start < dim; start += radix * span) {
    for (int i = start; i < start + span; ++i) {
      V held[radix];
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) held[r] = x[i + r * span];
      transform(held);
      if (turns) {
#pragma GCC unroll 16
        for (int r = 0; r < radix; ++r) held[r] = turned(held[r], factors[i + r * span]);
        transform(held);
      }
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) x[i + r * span] = held[r];
    }
  }
}

template <bool turns, class V, class Factor>
static void pass(V* x, int dim, int span, int stages, const Factor* factors) {
  switch (stages) {
    case 0: return pass<0, turns>(x, dim, span, factors);
    case 1: return pass<1, turns>(x, dim, span, factors);
    case 2: return pass<2, turns>(x, dim, span, factors);
    case 3: return pass<3, turns>(x, dim, span, factors);
    default: return pass<4, turns>(x, dim, span, factors);
  }
}

// Rounds of multiplications by factors [rounds][d] and Walsh-Hadamard transforms that are not normalized, in place and
// without the factors of the first round, which are the caller's.
//
// A transform may take its stages in any order: rounds go through the passes upwards and downwards by turns, so that
// one ends with the pass with which the next begins, in registers.
template <class V, class Factor>
static void rotate(const Factor* factors, int rounds, int dim, V* x) {
  constexpr int deepest = kLanes == 16 ? 4 : 3;  // what the registers hold
  const int all = __builtin_ctz(dim), passes = all > 2 * deepest ? (all + deepest - 1) / deepest : 2;
  int spans[8], stages[8];
  for (int p = 0, done = 0; p < passes; done += stages[p++]) {
    spans[p] = 1 << done;
    stages[p] = (all - done + passes - p - 1) / (passes - p);
  }
  int at = 0, step = 1;
  pass<false>(x, dim, spans[at], stages[at], factors);
  for (int round = 1; round <= rounds; ++round, step = -step) {
    for (int left = passes - 2; left > 0; --left) {
      at += step;
      pass<false>(x, dim, spans[at], stages[at], factors);
    }
    at += step;
    if (round < rounds) {
      pass<true>(x, dim, spans[at], stages[at], factors + (int64_t)round * dim);
    } else {
      pass<false>(x, dim, spans[at], stages[at], factors);
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
