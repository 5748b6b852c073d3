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
  uint32_t* cells;  // [d][kLanes]: where the search table has a coordinate's, in bytes
  uint8_t* notes;   // [d][kTogether][kStates], of each step: see Costs::step

  // In sizes of a register.
  static size_t registers(const FibForm& form) {
    return form.dim * (1 + (size_t)kTogether * kStates / sizeof(vf));
  }

  PathScratch(const FibForm& form, vf* memory)
      : cells(reinterpret_cast<uint32_t*>(memory)), notes(reinterpret_cast<uint8_t*>(memory + form.dim)) {}
};

// The search for the vectors of kTogether lanes, the first one being `first`; `bits` of a symbol.
template <int bits, int ways>
struct Paths {
  using Cell = TrellisCell<ways>;
  static constexpr int kInterval = ways == 2 ? 8 : 2;  // coordinates at which the least cost is taken off

  const TrellisForm& trellis;
  const PathScratch& scratch;
  const Cell* cells;  // [2 reach + 1]
  int dim, first;

  static const Cell& cell_at(const Cell* cells, uint32_t offset) {
    return *reinterpret_cast<const Cell*>(reinterpret_cast<const char*>(cells) + offset);
  }

  const TrellisLayout& layout() const { return *(Costs::kAlternates ? trellis.alternating : trellis.layout); }

  // Steps at an even coordinate, to which cells and notes point, and at the next one. For two vectors: a step waits for the
  // one before it. What is taken off is known a step early, as it takes as long as a step to find.
  template <bool lowered>
  [[gnu::always_inline]] static inline void take_two(Costs (&costs)[2], const Places& places, const Cell* cells,
                                                     const uint32_t* of_lanes, uint8_t* notes) {
    Costs::Bytes paid[2]{};
    for (int k = 0; k < 2; ++k) {
      if (lowered) paid[k] = costs[k].least_everywhere();
      costs[k].template step<bits, ways, false, 0>(places, cell_at(cells, of_lanes[k]), notes + k * kStates, paid[k]);
    }
    of_lanes += kLanes;
    notes += kTogether * kStates;
    for (int k = 0; k < 2; ++k) {
      costs[k].template step<bits, ways, lowered, 1>(places, cell_at(cells, of_lanes[k]), notes + k * kStates, paid[k]);
    }
  }

  // Steps at start, start + 1 .. of a number of coordinates, which kInterval divides; the vector is a ring.
  void walk(Costs (&pair)[2], int lane, int start, int coordinates) const {
    const Places places(layout());
    // Held here, as a step could write to anything for all that a compiler knows.
    const Cell* const cells = this->cells;
    const uint32_t* const all_cells = scratch.cells + first + lane;
    uint8_t* const all_notes = scratch.notes + lane * kStates;
    const int d = dim;
    Costs costs[2] = {pair[0], pair[1]};
    for (int i = 0; i < coordinates; i += kInterval) {
#pragma GCC unroll 4
      for (int j = 0; j < kInterval; j += 2) {
        const int t = start + i + j < d ? start + i + j : start + i + j - d;
        const uint32_t* const of_lanes = all_cells + t * kLanes;
        uint8_t* const notes = all_notes + t * kTogether * kStates;
        if (j + 2 < kInterval) {
          take_two<false>(costs, places, cells, of_lanes, notes);
        } else {
          take_two<true>(costs, places, cells, of_lanes, notes);
        }
      }
    }
    for (int k = 0; k < 2; ++k) pair[k] = costs[k];
  }

  // The place in a lane that a row of it was reached from, by what the step noted at the place and in its lane.
  static size_t source(const Cell& tried, size_t row, const uint8_t* place, const uint8_t* lane) {
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

  // Follows the best paths back whose arrivals behind the step before `stop` are `ends` [kTogether], to those behind the
  // step before 0. Calls found(t, lane, symbol) on the way, for the newest symbols behind the steps.
  template <class Found>
  void follow(int stop, size_t* ends, Found found) const {
    const uint32_t* of_lanes = scratch.cells + first + stop * kLanes;
    const uint8_t* notes = scratch.notes + stop * kTogether * kStates;
    size_t at[kTogether];
    for (int lane = 0; lane < kTogether; ++lane) at[lane] = ends[lane];
    for (int t = stop - 1; t >= 0; --t) {
      const uint16_t* const arrivals = layout().arrivals[t & 1];
      of_lanes -= kLanes;
      notes -= kTogether * kStates;
      const uint32_t* const ahead = t < 2 ? of_lanes : of_lanes - 2 * kLanes;
#pragma GCC unroll 8
      for (int lane = 0; lane < kTogether; ++lane) {
        // The cells of a later step, which do not depend on the path.
        __builtin_prefetch(&cell_at(cells, ahead[lane]));
        const size_t place = at[lane] & 0xFF, row = place & 15, other = place & 0xF0;
        const uint8_t* const noted = notes + lane * kStates;
        found(t, lane, (int)(at[lane] >> 8));
        at[lane] = arrivals[other | source(cell_at(cells, of_lanes[lane]), row, noted + place, noted + other)];
      }
    }
    for (int lane = 0; lane < kTogether; ++lane) ends[lane] = at[lane];
  }

  // The arrival of a state behind an odd step.
  size_t arrival(int state) const { return layout().arrivals[0][layout().held[0][state]]; }

  // For each vector a state to have at the seam: that of the best path over the coordinates around it.
  void find_seams(int* seams) const {
    size_t ends[kTogether];
    for (int lane = 0; lane < kTogether; lane += 2) {
      Costs pair[2];
      for (Costs& costs : pair) costs.fill(0);
      walk(pair, lane, dim - trellis.overlap, 2 * trellis.overlap);
      for (int k = 0; k < 2; ++k) ends[lane + k] = arrival(least_state(pair[k]));
    }
    follow(trellis.overlap, ends, [](int, int, int) {});
    for (int lane = 0; lane < kTogether; ++lane) seams[lane] = layout().states[1][ends[lane] & 0xFF];
  }

  // The lowest state among those of the least cost.
  int least_state(const Costs& costs) const {
    alignas(64) uint8_t held[kStates];
    costs.write(held);
    const uint8_t least = (uint8_t)costs.least(), *const states = layout().waiting;
    uint8_t lowest = 255;
    for (int place = 0; place < kStates; ++place) {
      // Of places with other costs the highest one: without branches, so that compilers take many places at a time.
      const uint8_t state = (uint8_t)(states[place] | -(held[place] != least));
      lowest = state < lowest ? state : lowest;
    }
    return lowest;
  }

  // Symbols [d][kLanes] of the best paths from their seams and back to them.
  void find_symbols(vi* symbols) const {
    int seams[kTogether];
    size_t ends[kTogether];
    find_seams(seams);
    for (int lane = 0; lane < kTogether; lane += 2) {
      Costs pair[2];
      for (int k = 0; k < 2; ++k) {
        pair[k].fill(kMostCost<ways>);
        pair[k].set(layout().held[0][seams[lane + k]], 0);
      }
      walk(pair, lane, 0, dim);
    }
    for (int lane = 0; lane < kTogether; ++lane) ends[lane] = arrival(seams[lane]);
    int32_t* const out = reinterpret_cast<int32_t*>(symbols) + first;
    follow(dim, ends, [out](int t, int lane, int symbol) { out[t * kLanes + lane] = symbol; });
  }
};

template <int bits>
static void search_lanes(const FibForm& form, const PathScratch& scratch, vi* symbols) {
  const TrellisForm& trellis = *form.trellis;
  for (int first = 0; first < kLanes; first += kTogether) {
    if (trellis.two) {
      Paths<bits, 2>{trellis, scratch, trellis.two, form.dim, first}.find_symbols(symbols);
    } else {
      Paths<bits, 3>{trellis, scratch, trellis.three, form.dim, first}.find_symbols(symbols);
    }
  }
}

// Symbols [d] of the best paths to x [d].
static void search_paths(const FibForm& form, const vf* x, const PathScratch& scratch, vi* symbols) {
  const TrellisForm& trellis = *form.trellis;
  const float reach = (float)trellis.reach;
  const int nbytes = trellis.two ? sizeof *trellis.two : sizeof *trellis.three;
  for (int t = 0; t < form.dim; ++t) {
    const vf cell = clamp(x[t] * splat(trellis.cells_per_one), -reach, reach);
    store(scratch.cells + t * kLanes, (nearest(cell) + splat(trellis.reach)) * splat(nbytes));
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
