// Rotations, coordinate by coordinate: of kLanes vectors at a time in float32 or float64, of twice as many in words.
#pragma once

#include "encode_words.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline vf splat_as(float x, vf) { return splat(x); }
static inline vd splat_as(double x, vd) { return splat_wide(x); }

// Steps of a rotation: a + b and a - b, and what begins a round, signs. The difference is a multiply-add, exact as one
// factor is 1, since some processors have units for additions beside those for products; signs need neither.
template <class V>
static inline void butterfly(V& a, V& b) {
  const V sum = a + b;
  b = subtract_as_product(a, b);
  a = sum;
}
static inline vf turned(vf v, int32_t sign) { return as_float(as_int(v) ^ splat(sign)); }
static inline vd turned(vd v, int64_t sign) {
  typedef int64_t bits __attribute__((vector_size(4 * kLanes)));
  return (vd)((bits)v ^ (sign - bits{}));
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

// The passes of a transform of 2^all coordinates: as many stages at a time as registers hold, in two parts or more.
template <int all>
struct Passes {
  static constexpr int dim = 1 << all, deepest = kLanes == 16 ? 4 : 3;
  static constexpr int count = all > 2 * deepest ? (all + deepest - 1) / deepest : 2;

  // Stages in front of a pass.
  static constexpr int before(int pass) {
    int stages = 0;
    for (int p = 0; p < pass; ++p) stages += (all - stages + count - p - 1) / (count - p);
    return stages;
  }
};

// One pass, butterflies of the least reach first or last. One that turns ends a round there and begins the next one:
// factors [d] multiply, and the same stages follow in the opposite order. Where coordinates lie is known to the
// compiler: addresses of sixteen would not find room in general registers.
template <class P, int index, bool upwards, bool turns, class V, class Factor>
static void pass(V* x, const Factor* factors) {
  constexpr int stages = P::before(index + 1) - P::before(index), radix = 1 << stages, span = 1 << P::before(index);
  for (int start = 0; start < P::dim; start += radix * span) {
    for (int i = start; i < start + span; ++i) {
      V held[radix];
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) held[r] = x[i + r * span];
      transform<stages, upwards>(held);
      if constexpr (turns) {
#pragma GCC unroll 16
        for (int r = 0; r < radix; ++r) held[r] = turned(held[r], factors[i + r * span]);
        transform<stages, !upwards>(held);
      }
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) x[i + r * span] = held[r];
    }
  }
}

// The rest of a round behind pass `done`, and the first pass of the next one, for which there are factors [d].
template <class P, bool upwards, int done = 0, class V, class Factor>
static void finish_round(const Factor* factors, V* x) {
  constexpr int next = done + 1, index = upwards ? next : P::count - 1 - next;
  if constexpr (next < P::count - 1) {
    pass<P, index, upwards, false>(x, factors);
    finish_round<P, upwards, next>(factors, x);
  } else if (factors) {
    pass<P, index, upwards, true>(x, factors);
  } else {
    pass<P, index, upwards, false>(x, factors);
  }
}

template <class P, class V, class Factor>
static void rotate(const Factor* factors, int rounds, V* x) {
  pass<P, 0, true, false>(x, factors);
  for (int round = 1; round <= rounds; ++round) {
    const Factor* next = round < rounds ? factors + (int64_t)round * P::dim : nullptr;
    if (round % 2) {
      finish_round<P, true>(next, x);
    } else {
      finish_round<P, false>(next, x);
    }
  }
}

// Rounds of multiplications by factors [rounds][d] and Walsh-Hadamard transforms that are not normalized, in place and
// without the factors of the first round, which are the caller's. d is a power of two from 2 to 256.
//
// A transform may take its stages in any order: rounds go through them upwards and downwards by turns, so that one ends
// with the pass with which the next begins, in registers. The order is the same however many stages a pass has.
template <int all = 1, class V, class Factor>
static void rotate(const Factor* factors, int rounds, int dim, V* x) {
  if (dim == 1 << all) return rotate<Passes<all>>(factors, rounds, x);
  if constexpr (all < 8) rotate<all + 1>(factors, rounds, dim, x);
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
