// The costs of a trellis's 256 states in the registers of an instruction set, and one step of Viterbi's algorithm: what
// trellis_layout.h describes. A step tries for each state a few ways to it and keeps the least sum; sums stay at 255. A
// `lowered` step takes off what it is given: what the best path had cost a step before. What a step notes [kStates] is what its way back is
// found by: of two ways the sums behind it, with the bit that says which way it was, else the costs before it.
#pragma once

#if defined(__AVX512VBMI__)
#include "encode_costs_avx512.h"
#elif defined(__AVX2__)
#include "encode_costs_avx2.h"
#else

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "trellis_layout.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

typedef uint8_t Lane __attribute__((vector_size(16)));

#if defined(__SSE2__)
static inline Lane minimum(Lane a, Lane b) { return (Lane)_mm_min_epu8((__m128i)a, (__m128i)b); }
static inline Lane add_to_most(Lane a, Lane b) { return (Lane)_mm_adds_epu8((__m128i)a, (__m128i)b); }
#else
static inline Lane minimum(Lane a, Lane b) { return a < b ? a : b; }
static inline Lane add_to_most(Lane a, Lane b) { return a + minimum(b, ~a); }
#endif
static inline Lane splat_byte(int x) { return (uint8_t)x - Lane{}; }

// How bytes change their places between two steps.
struct Places {
  explicit Places(const TrellisLayout& layout) : layout(layout) {}
  const TrellisLayout& layout;
};

class Costs {
 public:
  static constexpr bool kAlternates = false;

  void fill(int cost) {
    for (Lane& lane : costs_) lane = splat_byte(cost);
  }

  void set(int place, int cost) { costs_[place / 16][place & 15] = (uint8_t)cost; }

  int least() const {
    Lane all = costs_[0];
    for (int lane = 1; lane < kStateLanes; ++lane) all = minimum(all, costs_[lane]);
    int least = all[0];
    for (int i = 1; i < 16; ++i) least = all[i] < least ? all[i] : least;
    return least;
  }

  typedef Lane Bytes;  // one byte in all places

  Bytes least_everywhere() const { return splat_byte(least()); }

  void write(uint8_t* to) const { std::memcpy(to, costs_, sizeof costs_); }

  template <int bits, int ways, bool lowered, int parity>
  void step(const Places& places, const TrellisCell<ways>& cell, uint8_t* noted, Bytes paid) {
    if constexpr (ways > 2) write(noted);
    Lane tried[ways][kStateLanes], reached[kStateLanes];
    for (int way = 0; way < ways; ++way) shuffle(cell.from[way], tried[way]);
    const Lane cost_bits = splat_byte(kMostCost<ways>);
    for (int i = 0; i < kStateLanes; ++i) {
      for (int way = 0; way < ways; ++way) {
        const Lane sum = add_to_most(tried[way][i], load<Lane>(cell.cost[way]));
        reached[i] = way ? minimum(reached[i], sum) : sum;
      }
      if (lowered) reached[i] -= paid;
      if constexpr (ways == 2) store(noted + 16 * i, reached[i]);
      reached[i] &= cost_bits;
    }
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(reached);
    uint8_t* const to = reinterpret_cast<uint8_t*>(costs_);
    for (int place = 0; place < kStates; ++place) to[place] = bytes[places.layout.order[0][place]];
  }

 private:
  // The bytes of each lane that are at `from` [16] in it.
  void shuffle(const uint8_t* from, Lane* shuffled) const {
#if defined(__aarch64__)
    const uint8x16_t places = vld1q_u8(from);
    for (int lane = 0; lane < kStateLanes; ++lane) shuffled[lane] = (Lane)vqtbl1q_u8((uint8x16_t)costs_[lane], places);
#else
    // There is no such instruction. All lanes before one of them is looked at: what was written byte by byte is not ready
    // at once to be read as a register.
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(costs_);
    uint8_t* const to = reinterpret_cast<uint8_t*>(shuffled);
    for (int lane = 0; lane < kStates; lane += 16) {
      for (int row = 0; row < 16; ++row) to[lane + row] = bytes[lane + from[row]];
    }
#endif
  }

  Lane costs_[kStateLanes];
};

}  // namespace FIBKV_ISA
}  // namespace fibkv

#endif
