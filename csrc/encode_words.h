// Numbers of 16 bits, and the rotation in them.
//
// A register of words has one coordinate of two vectors in each 32-bit lane: of the first kLanes vectors in the lower
// halves, of kLanes others in the upper ones.
#pragma once

#include "encode.h"
#include "encode_lanes.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fibkv {
namespace FIBKV_ISA {

typedef int16_t vw __attribute__((vector_size(4 * kLanes)));

static inline vw splat_word(int x) { return (vw)splat((x & 0xFFFF) | (int)((uint32_t)x << 16)); }

static inline vi lower_words(vw v) { return (vi)v << 16 >> 16; }
static inline vi upper_words(vw v) { return (vi)v >> 16; }
static inline vw pack_words(vi lower, vi upper) { return (vw)((lower & splat(0xFFFF)) | (upper << 16)); }

// (a b + 2^14) / 2^15 rounded down, a b / 2^16 rounded down, and for pairs of words a and b sum + a0 b0 + a1 b1.
#if defined(__AVX512F__)
static inline vw multiply_fraction(vw a, vw b) { return (vw)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
static inline vw multiply_high(vw a, vw b) { return (vw)_mm512_mulhi_epi16((__m512i)a, (__m512i)b); }
static inline vw minimum(vw a, vw b) { return (vw)_mm512_min_epi16((__m512i)a, (__m512i)b); }
static inline vw maximum(vw a, vw b) { return (vw)_mm512_max_epi16((__m512i)a, (__m512i)b); }
static inline vi add_products(vi sum, vi a, vi b) {
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
static inline vw multiply_fraction(vw a, vw b) { return (vw)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
static inline vw multiply_high(vw a, vw b) { return (vw)_mm256_mulhi_epi16((__m256i)a, (__m256i)b); }
static inline vw minimum(vw a, vw b) { return (vw)_mm256_min_epi16((__m256i)a, (__m256i)b); }
static inline vw maximum(vw a, vw b) { return (vw)_mm256_max_epi16((__m256i)a, (__m256i)b); }
static inline vi add_products(vi sum, vi a, vi b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
static inline vw multiply_high(vw a, vw b) { return (vw)_mm_mulhi_epi16((__m128i)a, (__m128i)b); }
static inline vw multiply_fraction(vw a, vw b) {
  // The product is 2^16 high + low: twice `high`, and what the upper two bits of `low` and its rounding add.
  typedef uint16_t unsigned_words __attribute__((vector_size(16)));
  const unsigned_words low = (unsigned_words)(a * b);
  return (multiply_high(a, b) << 1) + (vw)(((low >> 14) + 1) >> 1);
}
static inline vw minimum(vw a, vw b) { return (vw)_mm_min_epi16((__m128i)a, (__m128i)b); }
static inline vw maximum(vw a, vw b) { return (vw)_mm_max_epi16((__m128i)a, (__m128i)b); }
static inline vi add_products(vi sum, vi a, vi b) { return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
static inline vw multiply_fraction(vw a, vw b) {
  const vi half = splat(1 << 14);
  return pack_words((lower_words(a) * lower_words(b) + half) >> 15, (upper_words(a) * upper_words(b) + half) >> 15);
}
static inline vw multiply_high(vw a, vw b) {
  return pack_words((lower_words(a) * lower_words(b)) >> 16, (upper_words(a) * upper_words(b)) >> 16);
}
static inline vw minimum(vw a, vw b) { return a < b ? a : b; }
static inline vw maximum(vw a, vw b) { return a > b ? a : b; }
static inline vi add_products(vi sum, vi a, vi b) {
  return sum + lower_words((vw)a) * lower_words((vw)b) + upper_words((vw)a) * upper_words((vw)b);
}
#endif

// `stages` stages of a transform of registers, the first with butterflies of reach 1.
template <int stages>
[[gnu::always_inline]] static inline void transform_words(vw* held) {
#pragma GCC unroll 4
  for (int s = 0; s < stages; ++s) {
    const int reach = 1 << s;
#pragma GCC unroll 8
    for (int pair = 0; pair < (1 << stages) / 2; ++pair) {
      const int low = pair / reach * 2 * reach + pair % reach;
      const vw a = held[low], b = held[low + reach];
      held[low] = a + b;
      held[low + reach] = a - b;
    }
  }
}

// One pass: `stages` stages, the first with butterflies of reach `span`. With `factors` [d] a round ends there and the
// next one begins: they multiply, as parts of 2^15 in both halves, and the same stages follow once more.
template <int stages, bool turns>
static void pass_of_words(vw* x, int dim, int span, const int32_t* factors) {
  constexpr int radix = 1 << stages;
  for (int start = 0; start < dim; start += radix * span) {
    for (int i = start; i < start + span; ++i) {
      vw held[radix];
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) held[r] = x[i + r * span];
      transform_words<stages>(held);
      if (turns) {
#pragma GCC unroll 16
        for (int r = 0; r < radix; ++r) held[r] = multiply_fraction(held[r], (vw)splat(factors[i + r * span]));
        transform_words<stages>(held);
      }
#pragma GCC unroll 16
      for (int r = 0; r < radix; ++r) x[i + r * span] = held[r];
    }
  }
}

template <bool turns>
static void pass_of_words(vw* x, int dim, int span, int stages, const int32_t* factors = nullptr) {
  switch (stages) {
    case 1: return pass_of_words<1, turns>(x, dim, span, factors);
    case 2: return pass_of_words<2, turns>(x, dim, span, factors);
    case 3: return pass_of_words<3, turns>(x, dim, span, factors);
    default: return pass_of_words<4, turns>(x, dim, span, factors);
  }
}

// Rounds of multiplications by factors [rounds][d] and transforms, in place, without the factors of the first round.
// A transform may take its stages in any order: rounds go through the passes upwards and downwards by turns, so that
// one ends with the pass with which the next begins, in registers. d is at least 8: there are two passes or more.
static void rotate_words(const int32_t* factors, int rounds, int dim, vw* x) {
  constexpr int deepest = kLanes == 16 ? 4 : 3;
  const int all = __builtin_ctz(dim), passes = all > 2 * deepest ? (all + deepest - 1) / deepest : 2;
  int spans[8], stages[8];
  for (int pass = 0, done = 0; pass < passes; done += stages[pass++]) {
    spans[pass] = 1 << done;
    stages[pass] = (all - done + passes - pass - 1) / (passes - pass);
  }
  int at = 0, step = 1;
  pass_of_words<false>(x, dim, spans[at], stages[at]);
  for (int round = 1; round <= rounds; ++round, step = -step) {
    for (int left = passes - 2; left > 0; --left) {
      at += step;
      pass_of_words<false>(x, dim, spans[at], stages[at]);
    }
    at += step;
    if (round < rounds) {
      pass_of_words<true>(x, dim, spans[at], stages[at], factors + (int64_t)round * dim);
    } else {
      pass_of_words<false>(x, dim, spans[at], stages[at]);
    }
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
