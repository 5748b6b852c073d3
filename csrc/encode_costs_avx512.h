// `Costs` of encode_costs.h in four registers of AVX-512.
#pragma once

#include "trellis_layout.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

// How bytes change their places behind an even step and behind an odd one.
struct Places {
  explicit Places(const TrellisLayout& layout) {
    for (int i = 0; i < 4; ++i) {
      within[i] = _mm512_loadu_si512(layout.order[1] + 64 * i);
      across[i] = _mm512_loadu_si512(layout.order[0] + 64 * i);
      is_high[i] = _mm512_movepi8_mask(across[i]);
    }
  }

  __m512i within[4];  // a register, below 4 bits: the lower six bits of an index count
  // Each place from two registers of four: an index has seven bits, and the eighth says which two.
  __m512i across[4];
  __mmask64 is_high[4];
};

class Costs {
 public:
  static constexpr bool kAlternates = true;

  void fill(int cost) {
    for (__m512i& part : costs_) part = _mm512_set1_epi8((char)cost);
  }

  void set(int place, int cost) {
    for (int i = 0; i < 4; ++i) {
      const __mmask64 there = place / 64 == i ? 1ull << (place & 63) : 0;
      costs_[i] = _mm512_mask_set1_epi8(costs_[i], there, (char)cost);
    }
  }

  typedef __m512i Bytes;  // one byte in all places

  int least() const { return _mm_extract_epi8(least_byte(), 0); }
  Bytes least_everywhere() const { return _mm512_broadcastb_epi8(least_byte()); }

  void write(uint8_t* to) const {
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 64 * i, costs_[i]);
  }

  template <int bits, int ways, bool lowered, int parity>
  void step(const Places& places, const TrellisCell<ways>& cell, uint8_t* noted, Bytes paid) {
    if constexpr (ways > 2) write(noted);
    const auto everywhere = [](const uint8_t* row) {
      return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)row));
    };
    __m512i from[ways], cost[ways], reached[4];
    for (int way = 0; way < ways; ++way) {
      from[way] = everywhere(cell.from[way]);
      cost[way] = everywhere(cell.cost[way]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 3
      for (int way = 0; way < ways; ++way) {
        const __m512i sum = _mm512_adds_epu8(_mm512_shuffle_epi8(costs_[i], from[way]), cost[way]);
        reached[i] = way ? _mm512_min_epu8(reached[i], sum) : sum;
      }
      if (lowered) reached[i] = _mm512_sub_epi8(reached[i], paid);
      if constexpr (ways == 2) _mm512_storeu_si512(noted + 64 * i, reached[i]);
    }
    const __m512i cost_bits = _mm512_set1_epi8((char)kMostCost<ways>);
    if constexpr (bits < 4 && parity == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        costs_[i] = _mm512_and_si512(_mm512_permutexvar_epi8(places.within[i], reached[i]), cost_bits);
      }
      return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i order = places.across[i];
      const __m512i low = _mm512_maskz_permutex2var_epi8(~places.is_high[i], reached[0], order, reached[1]);
      const __m512i high = _mm512_maskz_permutex2var_epi8(places.is_high[i], reached[2], order, reached[3]);
      costs_[i] = _mm512_ternarylogic_epi32(low, high, cost_bits, 0xA8);  // (low | high) & cost_bits
    }
  }

 private:
  __m128i least_byte() const {
    const __m512i all = _mm512_min_epu8(_mm512_min_epu8(costs_[0], costs_[1]), _mm512_min_epu8(costs_[2], costs_[3]));
    const __m256i half = _mm256_min_epu8(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i lane = _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return _mm_minpos_epu16(_mm_min_epu8(lane, _mm_srli_epi16(lane, 8)));
  }

  __m512i costs_[4];
};

}  // namespace FIBKV_ISA
}  // namespace fibkv
