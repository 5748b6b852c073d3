// Transposition of 32-bit elements in registers.
#pragma once

#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

// Of each 128 bits of a and b, elements of 32 or 64 bits by turns: the lower halves of both, and the upper ones.
#if defined(__AVX512F__)
static inline vi interleave_low(vi a, vi b) { return (vi)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b); }
static inline vi interleave_high(vi a, vi b) { return (vi)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b); }
static inline vi interleave_low_wide(vi a, vi b) { return (vi)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
static inline vi interleave_high_wide(vi a, vi b) { return (vi)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
static inline vi interleave_low(vi a, vi b) { return (vi)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
static inline vi interleave_high(vi a, vi b) { return (vi)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
static inline vi interleave_low_wide(vi a, vi b) { return (vi)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
static inline vi interleave_high_wide(vi a, vi b) { return (vi)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
static inline vi interleave_low(vi a, vi b) { return pick<0, 4, 1, 5>(a, b); }
static inline vi interleave_high(vi a, vi b) { return pick<2, 6, 3, 7>(a, b); }
static inline vi interleave_low_wide(vi a, vi b) { return pick<0, 1, 4, 5>(a, b); }
static inline vi interleave_high_wide(vi a, vi b) { return pick<2, 3, 6, 7>(a, b); }
#endif

// Transposes 4 x 4 elements within each 128 bits of four registers, in place.
static inline void transpose_four(vi* tile) {
  const vi low[2] = {interleave_low(tile[0], tile[1]), interleave_low(tile[2], tile[3])};
  const vi high[2] = {interleave_high(tile[0], tile[1]), interleave_high(tile[2], tile[3])};
  tile[0] = interleave_low_wide(low[0], low[1]);
  tile[1] = interleave_high_wide(low[0], low[1]);
  tile[2] = interleave_low_wide(high[0], high[1]);
  tile[3] = interleave_high_wide(high[0], high[1]);
}

// Transposes kLanes x kLanes elements in place: within 128 bits, then those.
static inline void transpose(vi* tile) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) transpose_four(tile + i);
#if defined(__AVX512F__)
  const auto at = [](vi v) { return (__m512i)v; };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vi even_low = (vi)_mm512_shuffle_i32x4(at(tile[i]), at(tile[4 + i]), 0x88);
    const vi odd_low = (vi)_mm512_shuffle_i32x4(at(tile[i]), at(tile[4 + i]), 0xDD);
    const vi even_high = (vi)_mm512_shuffle_i32x4(at(tile[8 + i]), at(tile[12 + i]), 0x88);
    const vi odd_high = (vi)_mm512_shuffle_i32x4(at(tile[8 + i]), at(tile[12 + i]), 0xDD);
    tile[i] = (vi)_mm512_shuffle_i32x4(at(even_low), at(even_high), 0x88);
    tile[4 + i] = (vi)_mm512_shuffle_i32x4(at(odd_low), at(odd_high), 0x88);
    tile[8 + i] = (vi)_mm512_shuffle_i32x4(at(even_low), at(even_high), 0xDD);
    tile[12 + i] = (vi)_mm512_shuffle_i32x4(at(odd_low), at(odd_high), 0xDD);
  }
#elif defined(__AVX2__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i low = (__m256i)tile[i], high = (__m256i)tile[4 + i];
    tile[i] = (vi)_mm256_permute2x128_si256(low, high, 0x20);
    tile[4 + i] = (vi)_mm256_permute2x128_si256(low, high, 0x31);
  }
#endif
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
