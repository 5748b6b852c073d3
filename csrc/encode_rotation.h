// Rotations, coordinate by coordinate: of kLanes vectors at a time in float32 or float64, of twice as many in words.
#pragma once

#include "encode_words.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline vf splat_as(float x, vf) { return splat(x); }
static inline vd splat_as(double x, vd) { return splat_wide(x); }

// Steps of a rotation: a + b and a - b, and what begins a round. The difference is a multiply-add, exact as one factor
// is 1, since some processors have units for additions beside those for products.
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

// Stages of a transform of registers, butterflies of reach 1 first or last.
template <int stages, bool upwards, class V>
[[gnu::always_inline]] static inline void transform(V* held) {
#pragma GCC unroll 4
  for (int s = 0; s < stages; ++s) {
    const int reach = 1 << (upwards ? s : stages - 1 - s);
#pragma GCC unroll 8
    for (int pair = 0; pair < (1 << stages) / 2; ++pair) {
      const int low = pair / reach * 2 * reach + pair % reach;
      butterfly(held[low], held[low + reach]);
    }
  }
}

// One pass: `stages` stages in registers, butterflies of reach `span` first or last. One that turns ends a round there
// and begins the next one: factors [d] multiply, and the same stages follow in the opposite order.
template <int stages, bool upwards, bool turns, class V, class Factor>
static void pass(V* x, int dim, int span, const Factor* factors) {
  constexpr int radix = 1 << stages;
  for (int start = 0; start < dim; start += radix * span) {
    for (int i = start; i < start + span; ++i) {
      V held[radix];
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) held[r] = x[i + r * span];
      transform<stages, upwards>(held);
      if (turns) {
#pragma GCC unroll 16
        for (int r = 0; r < radix; ++r) held[r] = turned(held[r], factors[i + r * span]);
        transform<stages, !upwards>(held);
      }
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) x[i + r * span] = held[r];
    }
  }
}

template <bool upwards, bool turns, class V, class Factor>
static void pass(V* x, int dim, int span, int stages, const Factor* factors) {
  switch (stages) {
    case 0: return pass<0, upwards, turns>(x, dim, span, factors);
    case 1: return pass<1, upwards, turns>(x, dim, span, factors);
    case 2: return pass<2, upwards, turns>(x, dim, span, factors);
    case 3: return pass<3, upwards, turns>(x, dim, span, factors);
    default: return pass<4, upwards, turns>(x, dim, span, factors);
  }
}

// The passes of a transform: as many stages at a time as registers hold, in two parts or more.
struct Passes {
  int count, spans[8], stages[8];

  explicit Passes(int dim) {
    constexpr int deepest = kLanes == 16 ? 4 : 3;
    const int all = __builtin_ctz(dim);
    count = all > 2 * deepest ? (all + deepest - 1) / deepest : 2;
    for (int p = 0, done = 0; p < count; done += stages[p++]) {
      spans[p] = 1 << done;
      stages[p] = (all - done + count - p - 1) / (count - p);
    }
  }
};

// The rest of a round behind its first pass, and the first pass of the next one, for which there are factors [d].
template <bool upwards, class V, class Factor>
static void finish_round(const Passes& passes, const Factor* factors, int dim, V* x) {
  const auto place = [&](int i) { return upwards ? i : passes.count - 1 - i; };
  for (int i = 1; i < passes.count - 1; ++i) {
    pass<upwards, false>(x, dim, passes.spans[place(i)], passes.stages[place(i)], factors);
  }
  const int last = place(passes.count - 1);
  if (factors) {
    pass<upwards, true>(x, dim, passes.spans[last], passes.stages[last], factors);
  } else {
    pass<upwards, false>(x, dim, passes.spans[last], passes.stages[last], factors);
  }
}

// Rounds of multiplications by factors [rounds][d] and Walsh-Hadamard transforms that are not normalized, in place and
// without the factors of the first round, which are the caller's.
//
// A transform may take its stages in any order: rounds go through them upwards and downwards by turns, so that one ends
// with the pass with which the next begins, in registers. The order is the same however many stages a pass has.
template <class V, class Factor>
static void rotate(const Factor* factors, int rounds, int dim, V* x) {
  const Passes passes(dim);
  pass<true, false>(x, dim, passes.spans[0], passes.stages[0], factors);
  for (int round = 1; round <= rounds; ++round) {
    const Factor* next = round < rounds ? factors + (int64_t)round * dim : nullptr;
    if (round % 2) {
      finish_round<true>(passes, next, dim, x);
    } else {
      finish_round<false>(passes, next, dim, x);
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
