// The best paths through a trellis for the vectors of a batch. Meaning: src/fibkv/kernels/reference_trellis.py.
#pragma once

#include "encode.h"
#include "encode_costs.h"
#include "encode_rows.h"

namespace fibkv {
namespace FIBKV_ISA {

// Vectors that are searched together: their paths are followed back in turn, since each waits for memory only.
constexpr int kTogether = kLanes < 8 ? kLanes : 8;

struct PathScratch {
  uint16_t* cells;  // [d][kLanes]
  uint8_t* notes;   // [d][kTogether][kStates], of each step: see Costs::step

  // In sizes of a register.
  static size_t registers(const FibForm& form) {
    return form.dim * (1 + (size_t)kTogether * kStates / sizeof(vf));
  }

  PathScratch(const FibForm& form, vf* memory)
      : cells(reinterpret_cast<uint16_t*>(memory)), notes(reinterpret_cast<uint8_t*>(memory + form.dim)) {}
};

// The search for the vectors of kTogether lanes, the first one being `first`; `bits` of a symbol.
template <int bits, int ways>
struct Paths {
  const TrellisForm& trellis;
  const PathScratch& scratch;
  int dim, first;

  const TrellisLayout& layout() const { return *(Costs::kAlternates ? trellis.alternating : trellis.layout); }

  // Steps at an even coordinate, to which cells and notes point, and at the next one. For two vectors: a step waits for the
  // one before it.
  template <bool lowered>
  [[gnu::always_inline]] static inline void take_two(Costs (&costs)[2], const Places& places, const TrellisCell* cells,
                                                     const uint16_t* of_lanes, uint8_t* notes) {
    for (int k = 0; k < 2; ++k) {
      costs[k].template step<bits, ways, false, 0>(places, cells[of_lanes[k]], notes + k * kStates);
    }
    of_lanes += kLanes;
    notes += kTogether * kStates;
    for (int k = 0; k < 2; ++k) {
      costs[k].template step<bits, ways, lowered, 1>(places, cells[of_lanes[k]], notes + k * kStates);
    }
  }

  // Steps at start, start + 1 .. of a number of coordinates, the vector being a ring; it and its parts before and behind
  // the seam are divisible by four.
  void walk(Costs (&pair)[2], int lane, int start, int coordinates) const {
    const Places places(layout());
    // Held here, as a step could write to anything for all that a compiler knows.
    const TrellisCell* const cells = trellis.cells;
    const uint16_t* const all_cells = scratch.cells + first + lane;
    uint8_t* const all_notes = scratch.notes + lane * kStates;
    const int d = dim;
    Costs costs[2] = {pair[0], pair[1]};
    for (int i = 0; i < coordinates; i += 4) {
      const int t = start + i < d ? start + i : start + i - d;
      const uint16_t* const of_lanes = all_cells + t * kLanes;
      uint8_t* const notes = all_notes + t * kTogether * kStates;
      // The least cost is taken off at every fourth coordinate, or at every second one.
      take_two<(ways > 2)>(costs, places, cells, of_lanes, notes);
      take_two<true>(costs, places, cells, of_lanes + 2 * kLanes, notes + 2 * kTogether * kStates);
    }
    for (int k = 0; k < 2; ++k) pair[k] = costs[k];
  }

  // The place in a lane that a row of it was reached from, by what the step noted at the place and in its lane.
  static size_t source(const TrellisCell& tried, size_t row, const uint8_t* place, const uint8_t* lane) {
    if constexpr (ways == 2) return tried.from[*place & 1][row];
    size_t from = tried.from[0][row];
    int least = lane[from] + tried.cost[0][row];
#pragma GCC unroll 2
    for (int way = 1; way < ways; ++way) {
      const size_t next = tried.from[way][row];
      const int sum = lane[next] + tried.cost[way][row];
      // Without branches, which nobody could predict.
      const int better = -(sum < least);
      from ^= (from ^ next) & (size_t)better;
      least ^= (least ^ sum) & better;
    }
    return from;
  }

  // Follows the best paths back that are at `places` [kTogether] behind the step before `stop`, to the places behind the
  // step before 0. Calls found(t, lane, state) on the way, for the states behind the steps.
  template <class Found>
  void follow(int stop, size_t* places, Found found) const {
    const TrellisCell* const cells = trellis.cells;
    const uint16_t* of_lanes = scratch.cells + first + stop * kLanes;
    const uint8_t* notes = scratch.notes + stop * kTogether * kStates;
    size_t at[kTogether];
    for (int lane = 0; lane < kTogether; ++lane) at[lane] = places[lane];
    for (int t = stop - 1; t >= 0; --t) {
      const uint8_t *const states = layout().states[t & 1], *const order = layout().order[t & 1];
      of_lanes -= kLanes;
      notes -= kTogether * kStates;
#pragma GCC unroll 8
      for (int lane = 0; lane < kTogether; ++lane) {
        const size_t place = at[lane], row = place & 15, other = place & 0xF0;
        const uint8_t* const noted = notes + lane * kStates;
        found(t, lane, states[place]);
        at[lane] = order[other | source(cells[of_lanes[lane]], row, noted + place, noted + other)];
      }
    }
    for (int lane = 0; lane < kTogether; ++lane) places[lane] = at[lane];
  }

  // The place of a state behind an odd step.
  size_t place_behind(int state) const { return layout().order[0][layout().held[0][state]]; }

  // For each vector a state to have at the seam: that of the best path over the coordinates around it.
  void find_seams(int* seams) const {
    size_t places[kTogether];
    for (int lane = 0; lane < kTogether; lane += 2) {
      Costs pair[2];
      for (Costs& costs : pair) costs.fill(0);
      walk(pair, lane, dim - trellis.overlap, 2 * trellis.overlap);
      for (int k = 0; k < 2; ++k) places[lane + k] = place_behind(least_state(pair[k]));
    }
    follow(trellis.overlap, places, [](int, int, int) {});
    for (int lane = 0; lane < kTogether; ++lane) seams[lane] = layout().states[1][places[lane]];
  }

  // The lowest state among those of the least cost.
  int least_state(const Costs& costs) const {
    alignas(64) uint8_t held[kStates];
    costs.write(held);
    const int least = costs.least();
    int state = 0;
    while (held[layout().held[0][state]] != least) ++state;
    return state;
  }

  // Symbols [d][kLanes] of the best paths from their seams and back to them.
  void find_symbols(vi* symbols) const {
    int seams[kTogether];
    size_t places[kTogether];
    find_seams(seams);
    for (int lane = 0; lane < kTogether; lane += 2) {
      Costs pair[2];
      for (int k = 0; k < 2; ++k) {
        pair[k].fill(kMostCost<ways>);
        pair[k].set(layout().held[0][seams[lane + k]], 0);
      }
      walk(pair, lane, 0, dim);
    }
    for (int lane = 0; lane < kTogether; ++lane) places[lane] = place_behind(seams[lane]);
    int32_t* const out = reinterpret_cast<int32_t*>(symbols) + first;
    follow(dim, places, [out](int t, int lane, int state) { out[t * kLanes + lane] = state >> (8 - bits); });
  }
};

template <int bits>
static void search_lanes(const FibForm& form, const PathScratch& scratch, vi* symbols) {
  const TrellisForm& trellis = *form.trellis;
  for (int first = 0; first < kLanes; first += kTogether) {
    if (trellis.ways == 2) {
      Paths<bits, 2>{trellis, scratch, form.dim, first}.find_symbols(symbols);
    } else {
      Paths<bits, 3>{trellis, scratch, form.dim, first}.find_symbols(symbols);
    }
  }
}

// Symbols [d] of the best paths to x [d].
static void search_paths(const FibForm& form, const vf* x, const PathScratch& scratch, vi* symbols) {
  const TrellisForm& trellis = *form.trellis;
  const vf rounding = splat(0x1.8p23f);  // to whole numbers, ties to even
  const float reach = (float)trellis.reach;
  for (int t = 0; t < form.dim; ++t) {
    const vf cell = clamp(x[t] * splat(trellis.cells_per_one), -reach, reach);
    store(scratch.cells + t * kLanes, low_halves(as_int(cell + rounding) - as_int(rounding) + splat(trellis.reach)));
  }
  switch (form.bits) {
    case 2: return search_lanes<2>(form, scratch, symbols);
    case 3: return search_lanes<3>(form, scratch, symbols);
    default: return search_lanes<4>(form, scratch, symbols);
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
