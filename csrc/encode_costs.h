// The costs of a trellis's 256 states in the registers of an instruction set, and one step of Viterbi's algorithm: what
// trellis_layout.h describes. A step tries for each state a few ways to it and keeps the least sum; sums stay at 255. A
// `lowered` step takes off what the best path had cost before it.
#pragma once

#if defined(__AVX512VBMI__)
#include "encode_costs_avx512.h"
#elif defined(__AVX2__)
#include "encode_costs_avx2.h"
#else

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "trellis_layout.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

typedef uint8_t Lane __attribute__((vector_size(16)));
typedef uint64_t Halves __attribute__((vector_size(16)));

static inline Lane shuffle(Lane bytes, Lane places) { return __builtin_shuffle(bytes, places); }
#if defined(__SSE2__)
static inline Lane minimum(Lane a, Lane b) { return (Lane)_mm_min_epu8((__m128i)a, (__m128i)b); }
static inline Lane add_to_most(Lane a, Lane b) { return (Lane)_mm_adds_epu8((__m128i)a, (__m128i)b); }
#else
static inline Lane minimum(Lane a, Lane b) { return a < b ? a : b; }
static inline Lane add_to_most(Lane a, Lane b) { return a + minimum(b, ~a); }
#endif
static inline Lane splat_byte(int x) { return (uint8_t)x - Lane{}; }

class Costs {
 public:
  explicit Costs(const TrellisLayout& layout) : layout_(layout) {}

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

  void write(uint8_t* to) const { std::memcpy(to, costs_, sizeof costs_); }

  template <int bits, int ways, bool lowered>
  void step(const TrellisCell& cell) {
    Lane from[ways], cost[ways];
    for (int way = 0; way < ways; ++way) {
      from[way] = load<Lane>(cell.from[way]);
      cost[way] = load<Lane>(cell.cost[way]);
    }
    const Lane least = splat_byte(lowered ? this->least() : 0);
    for (int i = 0; i < kStateLanes; ++i) {
      Lane reached;
      for (int way = 0; way < ways; ++way) {
        const Lane sum = add_to_most(shuffle(costs_[i], from[way]), cost[way]);
        reached = way ? minimum(reached, sum) : sum;
      }
      costs_[i] = reached - least;
    }
    change_places<bits>();
  }

 private:
  template <int bits>
  void change_places() {
    for (int round = 0; round < bits; ++round) {
      for (int lane = 0; lane < kStateLanes; ++lane) {
        if (lane >> round & 1) continue;
        const int other = lane | 1 << round;
        const Halves a = (Halves)shuffle(costs_[lane], load<Lane>(layout_.exchange[round][lane]));
        const Halves b = (Halves)shuffle(costs_[other], load<Lane>(layout_.exchange[round][other]));
        costs_[lane] = (Lane)__builtin_shuffle(a, b, Halves{0, 2});
        costs_[other] = (Lane)__builtin_shuffle(a, b, Halves{1, 3});
      }
    }
    // The symbol is in the low bits of a lane's number now, and belongs into the high ones.
    Lane settled[kStateLanes];
    for (int lane = 0; lane < kStateLanes; ++lane) {
      const int to = (lane & ((1 << bits) - 1)) << (4 - bits) | lane >> bits;
      settled[to] = shuffle(costs_[lane], load<Lane>(layout_.settle[lane]));
    }
    for (int lane = 0; lane < kStateLanes; ++lane) costs_[lane] = settled[lane];
  }

  const TrellisLayout& layout_;
  Lane costs_[kStateLanes];
};

}  // namespace FIBKV_ISA
}  // namespace fibkv

#endif
