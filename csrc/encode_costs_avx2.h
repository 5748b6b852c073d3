// `Costs` of encode_costs.h in eight registers of AVX2, two lanes each.
#pragma once

#include "trellis_layout.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

struct Places {
  explicit Places(const TrellisLayout& layout) : layout(layout) {}
  const TrellisLayout& layout;
};

class Costs {
 public:
  static constexpr bool kAlternates = false;

  void fill(int cost) {
    for (__m256i& part : parts_) part = _mm256_set1_epi8((char)cost);
  }

  void set(int place, int cost) { reinterpret_cast<uint8_t*>(parts_)[place] = (uint8_t)cost; }

  typedef __m256i Bytes;  // one byte in all places

  int least() const { return _mm_extract_epi8(least_byte(), 0); }
  Bytes least_everywhere() const { return _mm256_broadcastb_epi8(least_byte()); }

  void write(uint8_t* to) const { std::memcpy(to, parts_, sizeof parts_); }

  template <int bits, int ways, bool lowered, int parity>
  void step(const Places& places, const TrellisCell<ways>& cell, uint8_t* noted, Bytes paid) {
    if constexpr (ways > 2) write(noted);
    const auto everywhere = [](const uint8_t* row) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)row));
    };
    __m256i from[ways], cost[ways];
    for (int way = 0; way < ways; ++way) {
      from[way] = everywhere(cell.from[way]);
      cost[way] = everywhere(cell.cost[way]);
    }
    const __m256i cost_bits = _mm256_set1_epi8((char)kMostCost<ways>);
    for (int i = 0; i < kParts; ++i) {
      __m256i reached;
      for (int way = 0; way < ways; ++way) {
        const __m256i sum = _mm256_adds_epu8(_mm256_shuffle_epi8(parts_[i], from[way]), cost[way]);
        reached = way ? _mm256_min_epu8(reached, sum) : sum;
      }
      if (lowered) reached = _mm256_sub_epi8(reached, paid);
      if constexpr (ways == 2) {
        _mm256_storeu_si256((__m256i*)noted + i, reached);
        reached = _mm256_and_si256(reached, cost_bits);
      }
      parts_[i] = reached;
    }
    change_places<bits>(places.layout);
  }

 private:
  static constexpr int kParts = kStateLanes / 2;

  __m256i shuffled(int part, const uint8_t (*places)[16]) const {
    return _mm256_shuffle_epi8(parts_[part], _mm256_loadu_si256((const __m256i*)places[2 * part]));
  }

  template <int bits>
  void change_places(const TrellisLayout& layout) {
    // Round 0 is between the lanes of a part.
    for (int part = 0; part < kParts; ++part) {
      parts_[part] = _mm256_permute4x64_epi64(shuffled(part, layout.exchange[0]), 0xD8);
    }
#pragma GCC unroll 3
    for (int round = 1; round < bits; ++round) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) {
        const int other = part | 1 << (round - 1);
        if (part == other) continue;
        const __m256i a = shuffled(part, layout.exchange[round]), b = shuffled(other, layout.exchange[round]);
        parts_[part] = _mm256_unpacklo_epi64(a, b);
        parts_[other] = _mm256_unpackhi_epi64(a, b);
      }
    }
    for (int part = 0; part < kParts; ++part) parts_[part] = shuffled(part, layout.settle);
    if constexpr (bits < 4) gather_lanes<bits>();
  }

  // The symbol is in the low bits of a lane's number, and belongs into the high ones.
  template <int bits>
  void gather_lanes() {
    __m256i gathered[kParts];
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      const int low = lane_of<bits>(2 * part), high = lane_of<bits>(2 * part + 1);
      const __m256i a = parts_[low / 2], b = parts_[high / 2];
      gathered[part] = low & 1 ? _mm256_permute2x128_si256(a, b, 0x31) : _mm256_permute2x128_si256(a, b, 0x20);
    }
    for (int part = 0; part < kParts; ++part) parts_[part] = gathered[part];
  }

  // Where the lane is whose bits turned by those of a symbol are `to`. Two neighbours come from equal halves.
  template <int bits>
  static constexpr int lane_of(int to) {
    return (to << bits & 15) | to >> (4 - bits);
  }

  __m128i least_byte() const {
    __m256i all = parts_[0];
    for (int part = 1; part < kParts; ++part) all = _mm256_min_epu8(all, parts_[part]);
    const __m128i lane = _mm_min_epu8(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    return _mm_minpos_epu16(_mm_min_epu8(lane, _mm_srli_epi16(lane, 8)));
  }

  __m256i parts_[kParts];
};

}  // namespace FIBKV_ISA
}  // namespace fibkv
