// The best path through a trellis, for kShorts vectors at once: Viterbi's algorithm in 16-bit integers.
//
// What a path is, and what it costs, is written down in src/fibkv/kernels/reference_trellis.py, whose paths these are.
// In its letters: b bits of a symbol, n = 2^b, G = 2^(8 - b) groups of n states. All n states of a group lead to the
// same n states, and the label of the step is (symbol, state in the group) xor a constant of the group. So with the
// distances to all levels in memory, a group is n^2 additions and minima without an index to compute.
#pragma once

#include "encode.h"
#include "encode_rows.h"
#include "encode_shorts.h"

namespace fibkv {
namespace FIBKV_ISA {

constexpr int kStates = 256;
constexpr int kMostLabels = 256;
// Choices of four states go to a word of 16 bits.
constexpr int kChoiceWords = kStates / 4;

struct PathScratch {
  vs* points;     // [d]
  vs* choices;    // [d or 2 overlaps][kChoiceWords]
  vs* distances;  // [kMostLabels]
  vs* cost;       // [kStates]: before a step, and after it
  vs* next;

  static size_t registers(const FibForm& form) {
    return form.dim * (size_t)(1 + kChoiceWords) + kMostLabels + 2 * kStates;
  }

  PathScratch(const FibForm& form, vs* memory)
      : points(memory),
        choices(points + form.dim),
        distances(choices + (size_t)form.dim * kChoiceWords),
        cost(distances + kMostLabels),
        next(cost + kStates) {}
};

template <int b>
struct Walk {
  static constexpr int n = 1 << b, groups = kStates >> b, kMemory = (8 + b - 1) / b;
  const TrellisForm& trellis;
  PathScratch scratch;
  vs least{};  // of the costs, which are taken less by it

  // Distances of one coordinate to all levels, as multiples of n.
  void measure(vs point) {
    const vs most = splat_short(trellis.farthest), whole = splat_short(-n);
    for (int label = 0; label < 1 << trellis.label_bits; ++label) {
      const vs away = minimum(magnitude(point - splat_short(trellis.levels[label])), most) << (b - 1);
      scratch.distances[label] = high_product(away, away) & whole;
    }
  }

  // All states after one more coordinate, with their place in their own group in the low bits.
  //
  // A state is reached from any other within kMemory steps, so that costs differ by kMemory distances at most, and a
  // sum with one more fits into 16 bits.
  void step(vs point, vs* choices) {
    measure(point);
    const vs whole = splat_short(-n);
    vs lowest = splat_short(0xFFFF);
    for (int g = 0; g < groups; ++g) {
      const int mix = trellis.mixes[g];
      const vs* block = scratch.distances + (mix & -n * n);
      vs from[n];
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) from[j] = scratch.cost[g * n + (j ^ (mix & (n - 1)))] - least;
      const vs own = splat_short(g & (n - 1));
      for (int first = 0; first < n; first += 4) {
        vs word{};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int symbol = first + i;
          const vs* row = block + ((symbol * n) ^ (mix & (n * n - n)));
          vs best = from[0] + row[0];
#pragma GCC unroll 16
          for (int j = 1; j < n; ++j) best = minimum(best, from[j] + row[j]);
          word = and_or(best << (4 * i), splat_short((n - 1) << (4 * i)), word);
          best = and_or(best, whole, own);
          lowest = minimum(lowest, best);
          scratch.next[symbol * groups + g] = best;
        }
        choices[(g * n + first) / 4] = word;
      }
    }
    least = lowest & whole;
    vs* const after = scratch.next;
    scratch.next = scratch.cost;
    scratch.cost = after;
  }

  // The state before a coordinate, from the one behind it.
  static int before(int state, const vs* choices, int lane) {
    const int g = state & (groups - 1), symbol = state / groups;
    const uint16_t word = reinterpret_cast<const uint16_t*>(choices + (g * n + symbol) / 4)[lane];
    return g * n + (word >> 4 * (symbol & 3) & (n - 1));
  }

  // For each lane a state to have at the seam: that of the best path over the coordinates around it.
  void find_seams(int dim, int* seams) {
    const int overlap = trellis.overlap;
    least = vs{};
    for (int state = 0; state < kStates; ++state) scratch.cost[state] = splat_short(state & (n - 1));
    for (int t = -overlap; t < overlap; ++t) {
      step(scratch.points[t < 0 ? t + dim : t], scratch.choices + (size_t)(t < 0 ? 0 : t) * kChoiceWords);
    }
    vs lowest = splat_short(0xFFFF), winner{};
    for (int state = 0; state < kStates; ++state) {
      const vs cost = scratch.cost[state] & splat_short(-n);
      const vs better = (vs)(cost < lowest);
      winner = (winner & ~better) | (splat_short(state) & better);
      lowest = minimum(lowest, cost);
    }
    for (int lane = 0; lane < kShorts; ++lane) seams[lane] = winner[lane];
    for (int t = overlap - 1; t >= 0; --t) {
      const vs* choices = scratch.choices + (size_t)t * kChoiceWords;
      for (int lane = 0; lane < kShorts; ++lane) seams[lane] = before(seams[lane], choices, lane);
    }
  }

  // Leaves no cost above that of a state which is far from all paths.
  void limit() {
    for (int state = 0; state < kStates; ++state) {
      const vs most = least + splat_short(trellis.far_cost + (state & (n - 1)));
      scratch.cost[state] = minimum(scratch.cost[state], most);
    }
  }

  // Symbols [d][kLanes] of each half of the lanes, by the best path from its seam and back to it.
  void find_symbols(int dim, vi* low, vi* high) {
    int states[kShorts];
    find_seams(dim, states);
    least = vs{};
    for (int state = 0; state < kStates; ++state) {
      scratch.cost[state] = splat_short(trellis.far_cost + (state & (n - 1)));
    }
    uint16_t* costs = reinterpret_cast<uint16_t*>(scratch.cost);
    for (int lane = 0; lane < kShorts; ++lane) costs[states[lane] * kShorts + lane] = states[lane] & (n - 1);
    for (int t = 0; t < dim; ++t) {
      step(scratch.points[t], scratch.choices + (size_t)t * kChoiceWords);
      // Until the seam has reached all states, others only get dearer.
      if (t < kMemory) limit();
    }
    for (int t = dim - 1; t >= 0; --t) {
      const vs* choices = scratch.choices + (size_t)t * kChoiceWords;
      for (int lane = 0; lane < kShorts; ++lane) {
        (lane < kLanes ? low : high)[t][lane % kLanes] = states[lane] / groups;
        states[lane] = before(states[lane], choices, lane);
      }
    }
  }
};

// Points of one half of the lanes: a factor times unit vectors, in whole steps of the grid.
static void set_points(const FibForm& form, const vf* unit, float scale, int half, vs* points) {
  const TrellisForm& trellis = *form.trellis;
  const vf rounding = splat(0x1.8p23f);  // to whole numbers, ties to even
  for (int t = 0; t < form.dim; ++t) {
    const vf steps = clamp(unit[t] * splat(scale) * splat(trellis.steps), -trellis.reach, trellis.reach);
    const vi whole = as_int(steps + rounding) - as_int(rounding);
    store(reinterpret_cast<uint16_t*>(points + t) + half * kLanes, low_halves(whole));
  }
}

// Symbols [d] of both halves of the lanes, from their points.
static void search_paths(const FibForm& form, const PathScratch& scratch, vi* low, vi* high) {
  switch (form.bits) {
    case 2: return Walk<2>{*form.trellis, scratch}.find_symbols(form.dim, low, high);
    case 3: return Walk<3>{*form.trellis, scratch}.find_symbols(form.dim, low, high);
    default: return Walk<4>{*form.trellis, scratch}.find_symbols(form.dim, low, high);
  }
}

// Symbols [d] to the windows of which they are the newest bits, in place. The vector is a ring.
static void open_windows(const FibForm& form, vi* index) {
  const int shared = form.window - form.bits;
  // The state behind the last symbol is the one before the first.
  vi state{};
  for (int t = form.dim - (shared + form.bits - 1) / form.bits; t < form.dim; ++t) {
    state = (index[t] << (shared - form.bits)) | (vi)((vu)state >> form.bits);
  }
  for (int t = 0; t < form.dim; ++t) {
    index[t] = (index[t] << shared) | state;
    state = (vi)((vu)index[t] >> form.bits);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
