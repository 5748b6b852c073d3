// Numbers of 32 bits by bytes that name them, four of each lane at once.
#pragma once

#include "encode.h"
#include "encode_lanes.h"

namespace fibkv {
namespace FIBKV_ISA {

#if defined(__AVX512F__)
// numbers[i] of `planes` [4][256], the bytes of 256 numbers from the lowest, for byte i of each lane. A table of bytes is
// looked up in for 64 codes at once, which takes a third of the time of gathers.
static inline void look_up_four(const int8_t* planes, vi bytes, vi* numbers) {
  // Within 128 bits byte i of lane j goes to 4 i + j: what is interleaved below then has its lanes in order.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i codes = _mm512_shuffle_epi8((__m512i)bytes, order);
  const __mmask64 upper = _mm512_movepi8_mask(codes);
  const auto plane = [&](int i) {
    const auto quarter = [&](int j) { return _mm512_loadu_si512(planes + 256 * i + 64 * j); };
    const __m512i found = _mm512_permutex2var_epi8(quarter(0), codes, quarter(1));
    return _mm512_mask_mov_epi8(found, upper, _mm512_permutex2var_epi8(quarter(2), codes, quarter(3)));
  };
  const __m512i a = plane(0), b = plane(1), c = plane(2), d = plane(3);
  const __m512i low = _mm512_unpacklo_epi8(a, b), low_upper = _mm512_unpacklo_epi8(c, d);
  const __m512i high = _mm512_unpackhi_epi8(a, b), high_upper = _mm512_unpackhi_epi8(c, d);
  numbers[0] = (vi)_mm512_unpacklo_epi16(low, low_upper);
  numbers[1] = (vi)_mm512_unpackhi_epi16(low, low_upper);
  numbers[2] = (vi)_mm512_unpacklo_epi16(high, high_upper);
  numbers[3] = (vi)_mm512_unpackhi_epi16(high, high_upper);
}
#endif

static inline vi byte_of(vi bytes, int i) { return bytes >> (8 * i) & splat(0xFF); }

// Coordinates x[i] and y[i] of the codewords of pairs, N <= 256, that byte i of each lane names.
static inline void look_up_pairs(const FibForm& form, vi bytes, vf* x, vf* y) {
#if defined(__AVX512F__)
  vi numbers[8];
  look_up_four(form.pair_planes, bytes, numbers);
  look_up_four(form.pair_planes + 4 * 256, bytes, numbers + 4);
  for (int i = 0; i < 4; ++i) {
    x[i] = as_float(numbers[i]);
    y[i] = as_float(numbers[4 + i]);
  }
#else
  for (int i = 0; i < 4; ++i) gather_pairs(form.codewords, byte_of(bytes, i), x[i], y[i]);
#endif
}

// Calls take(b, x, y) with the codeword of each of the blocks' indices, k = 2.
template <class Take>
static inline void each_pair(const FibForm& form, const vi* index, Take take) {
  const int blocks = form.blocks();
  int b = 0;
  if (form.pair_planes) {
    for (; b + 4 <= blocks; b += 4) {
      vf x[4], y[4];
      look_up_pairs(form, index[b] | index[b + 1] << 8 | index[b + 2] << 16 | index[b + 3] << 24, x, y);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) take(b + i, x[i], y[i]);
    }
  }
  for (; b < blocks; ++b) {
    vf x, y;
    gather_each_pair(form.codewords, index + b, x, y);
    take(b, x, y);
  }
}

// Calls take(i, lanes of coordinate i) for the codewords of the blocks' indices.
template <class Take>
static inline void each_coordinate(const FibForm& form, const vi* index, Take take) {
  const int k = form.block, blocks = form.blocks();
  if (k == 2) {
    return each_pair(form, index, [&](int b, vf x, vf y) {
      take(2 * b, x);
      take(2 * b + 1, y);
    });
  }
  for (int b = 0; b < blocks; ++b) {
    if (k == 1) {
      take(b, as_float(gather_each(form.codewords, index + b)));
    } else if (k % 4 == 0) {
      for (int i = 0; i < k; i += 4) {
        vi found[4];
        gather_fours(form.codewords + i, k, index + b, found);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) take(k * b + i + j, as_float(found[j]));
      }
    } else {
      for (int i = 0; i < k; ++i) take(k * b + i, as_float(gather(form.codewords + i, index[b] * splat(k))));
    }
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
