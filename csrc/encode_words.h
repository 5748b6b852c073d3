// Numbers of 16 bits.
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

// The lower words of the lanes of a and of b side by side, and the upper ones: a's in the lower halves of lanes.
#if defined(__AVX512F__)
static inline vi take_odd_words(vi even, vi odd) {
  return (vi)_mm512_ternarylogic_epi32(_mm512_set1_epi32(0xFFFF), (__m512i)even, (__m512i)odd, 0xCA);
}
#elif defined(__AVX2__)
static inline vi take_odd_words(vi even, vi odd) { return (vi)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xAA); }
#else
static inline vi take_odd_words(vi even, vi odd) { return (even & splat(0xFFFF)) | (odd & splat((int)0xFFFF0000)); }
#endif
static inline vi pair_lower(vi a, vi b) { return take_odd_words(a, b << 16); }
static inline vi pair_upper(vi a, vi b) { return take_odd_words((vi)((vu)a >> 16), b); }

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
  return (vw)pair_lower((lower_words(a) * lower_words(b) + half) >> 15, (upper_words(a) * upper_words(b) + half) >> 15);
}
static inline vw multiply_high(vw a, vw b) {
  return (vw)pair_lower((lower_words(a) * lower_words(b)) >> 16, (upper_words(a) * upper_words(b)) >> 16);
}
static inline vw minimum(vw a, vw b) { return a < b ? a : b; }
static inline vw maximum(vw a, vw b) { return a > b ? a : b; }
static inline vi add_products(vi sum, vi a, vi b) {
  return sum + lower_words((vw)a) * lower_words((vw)b) + upper_words((vw)a) * upper_words((vw)b);
}
#endif

// Steps of a rotation (encode_rotation.h). Factors are in both halves of a number.
static inline void butterfly(vw& a, vw& b) {
  const vw sum = a + b;
  b = a - b;
  a = sum;
}
static inline vw turned(vw v, int32_t factor) { return multiply_fraction(v, (vw)splat(factor)); }

}  // namespace FIBKV_ISA
}  // namespace fibkv
