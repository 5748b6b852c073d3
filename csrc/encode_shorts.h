// Sixteen-bit lanes, twice as many to a register as vector.h has.
#pragma once

#include "encode_lanes.h"

namespace fibkv {
namespace FIBKV_ISA {

typedef uint16_t vs __attribute__((vector_size(4 * kLanes)));
constexpr int kShorts = 2 * kLanes;

static inline vs splat_short(int x) { return (uint16_t)x - vs{}; }

#if defined(__AVX512BW__)
static inline vs minimum(vs a, vs b) { return (vs)_mm512_min_epu16((__m512i)a, (__m512i)b); }
static inline vs high_product(vs a, vs b) { return (vs)_mm512_mulhi_epu16((__m512i)a, (__m512i)b); }
static inline vs and_or(vs a, vs b, vs c) {
  return (vs)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0xEA);
}
#elif defined(__AVX2__)
static inline vs minimum(vs a, vs b) { return (vs)_mm256_min_epu16((__m256i)a, (__m256i)b); }
static inline vs high_product(vs a, vs b) { return (vs)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }
static inline vs and_or(vs a, vs b, vs c) { return (a & b) | c; }
#else
static inline vs minimum(vs a, vs b) { return a < b ? a : b; }
static inline vs high_product(vs a, vs b) {
  vs high;
  for (int i = 0; i < kShorts; ++i) high[i] = (uint16_t)((uint32_t)a[i] * b[i] >> 16);
  return high;
}
static inline vs and_or(vs a, vs b, vs c) { return (a & b) | c; }
#endif

// |a| of signed numbers above -2^15: of a and -a the smaller one, as unsigned numbers.
static inline vs magnitude(vs a) { return minimum(a, -a); }

}  // namespace FIBKV_ISA
}  // namespace fibkv
