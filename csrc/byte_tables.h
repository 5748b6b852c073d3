// What code bytes stand for, 64 at a time: tables of bytes in AVX-512 registers.
//
// A 256-entry byte table is four registers: two two-register permutes, merged by the top bit of the codes, look up 64
// codes at once. (On Zen 4 each takes as long as a one-register permute, of which it would be four; on Intel, where they
// are three micro-operations, as long as two.) In tile order the result needs no unpacking: each 32-bit lane holds four
// terms of one sum.
#pragma once

#include <immintrin.h>

#include "side.h"

namespace fibkv {
namespace FIBKV_ISA {

// One plane of a 256-entry table.
struct Table {
  __m512i part[4];

  Table(const int8_t* table, int8_t flip) {
    for (int i = 0; i < 4; ++i) {
      part[i] = _mm512_xor_si512(_mm512_loadu_si512(table + 64 * i), _mm512_set1_epi8(flip));
    }
  }

  __m512i operator()(__m512i codes, __mmask64 bit7) const {
    const __m512i low = _mm512_permutex2var_epi8(part[0], codes, part[1]);
    return _mm512_mask_mov_epi8(low, bit7, _mm512_permutex2var_epi8(part[2], codes, part[3]));
  }
};

inline __mmask64 bit7_of(__m512i codes) { return _mm512_movepi8_mask(codes); }

// Looks up both planes of a pair.
struct Pair {
  static constexpr int unit = 1;
  Table even, odd;
  __m512i x, y;

  Pair(const Side& side, int pair, int8_t flip)
      : even(side.tables + 512 * pair, flip), odd(side.tables + 512 * pair + 256, flip) {}

  void look_up(const __m512i (&bytes)[1], __m512i /*before*/) {
    const __mmask64 bit7 = bit7_of(bytes[0]);
    x = even(bytes[0], bit7);
    y = odd(bytes[0], bit7);
  }
};

// The levels of 64 or of 256 labels.
struct SmallLevels {
  __m512i table;

  SmallLevels(const int8_t* levels, int8_t flip)
      : table(_mm512_xor_si512(_mm512_loadu_si512(levels), _mm512_set1_epi8(flip))) {}

  __m512i operator()(__m512i labels) const { return _mm512_permutexvar_epi8(labels, table); }
};

struct LargeLevels {
  Table table;

  LargeLevels(const int8_t* levels, int8_t flip) : table(levels, flip) {}

  __m512i operator()(__m512i labels) const { return table(labels, bit7_of(labels)); }
};

// Both planes of a pair of a trellis: the label of a window from the code bytes that it lies in, and its level.
template <typename Levels, int bytes_of_unit>
struct PathPair {
  static constexpr int unit = bytes_of_unit;
  Levels levels;
  __m512i now[2][unit], earlier[2];
  __m512i x, y;

  PathPair(const Side& side, int pair, int8_t flip) : levels(side.tables, flip) {
    const uint64_t* matrix = side.matrices + 2 * pair * (unit + 1);
    for (int plane = 0; plane < 2; ++plane) {
      for (int i = 0; i < unit; ++i) now[plane][i] = _mm512_set1_epi64(*matrix++);
      earlier[plane] = _mm512_set1_epi64(*matrix++);
    }
  }

  __m512i labels(int plane, const __m512i (&bytes)[unit], __m512i before) const {
    __m512i sum = _mm512_gf2p8affine_epi64_epi8(before, earlier[plane], 0);
#pragma GCC unroll 3
    for (int i = 0; i < unit; ++i) {
      sum = _mm512_xor_si512(sum, _mm512_gf2p8affine_epi64_epi8(bytes[i], now[plane][i], 0));
    }
    return sum;
  }

  void look_up(const __m512i (&bytes)[unit], __m512i before) {
    x = levels(labels(0, bytes, before));
    y = levels(labels(1, bytes, before));
  }
};

// The part of the six bits of a pair that lies in one byte of a unit, in the form of gf2p8affineqb.
constexpr uint64_t six_bits(int pair, int byte) {
  uint64_t matrix = 0;
  for (int i = 0; i < 6; ++i) {
    const int at = 6 * pair + i;
    if (at / 8 == byte) matrix |= uint64_t{1} << (8 * (7 - i) + at % 8);
  }
  return matrix;
}

// Both planes of a pair at three bits a coordinate: six bits of a unit name them, all pairs by the same two tables.
struct SixBitPair {
  static constexpr int unit = 3;
  static constexpr uint64_t parts[4][unit] = {{six_bits(0, 0), six_bits(0, 1), six_bits(0, 2)},
                                              {six_bits(1, 0), six_bits(1, 1), six_bits(1, 2)},
                                              {six_bits(2, 0), six_bits(2, 1), six_bits(2, 2)},
                                              {six_bits(3, 0), six_bits(3, 1), six_bits(3, 2)}};
  SmallLevels even, odd;
  __m512i part[unit];
  __m512i x, y;

  SixBitPair(const Side& side, int pair, int8_t flip) : even(side.tables, flip), odd(side.tables + 64, flip) {
    for (int i = 0; i < unit; ++i) part[i] = _mm512_set1_epi64(static_cast<int64_t>(parts[pair][i]));
  }

  void look_up(const __m512i (&bytes)[unit], __m512i /*before*/) {
    __m512i symbols = _mm512_gf2p8affine_epi64_epi8(bytes[0], part[0], 0);
#pragma GCC unroll 2
    for (int i = 1; i < unit; ++i) {
      symbols = _mm512_xor_si512(symbols, _mm512_gf2p8affine_epi64_epi8(bytes[i], part[i], 0));
    }
    x = even(symbols);
    y = odd(symbols);
  }
};

template <typename T>
struct Kind {
  using Tables = T;
};

// Calls visit(Kind<Tables>) with what looks up the planes of a side.
template <typename Visit>
inline void with_tables(const Side& side, Visit visit) {
  switch (side.label_bits) {
    case 0:
      if (side.unit == 3) return visit(Kind<SixBitPair>{});
      return visit(Kind<Pair>{});
    case 8: return visit(Kind<PathPair<LargeLevels, 1>>{});
  }
  if (side.unit == 3) return visit(Kind<PathPair<SmallLevels, 3>>{});
  visit(Kind<PathPair<SmallLevels, 1>>{});
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
