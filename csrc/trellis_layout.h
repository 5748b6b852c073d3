// How the costs of a trellis's 256 states lie in registers while the best path is searched.
//
// What a path is, and what it costs, is written down in src/fibkv/kernels/reference_trellis.py. In its letters: b bits of
// a symbol, n = 2^b, G = 2^(8 - b) groups of n states. All n states of a group lead to the same n states.
//
// Costs are bytes in 16 lanes of 16. Before a step they are *held* so that a lane has the n states of each of 16 / n
// groups, in the order of their label columns; the step makes of these n the costs of the n states that they lead to,
// *reached* in the order of their label rows. The 16 rows of a lane are the same in all lanes, so that what is tried in a
// cell of the search table is 16 bytes for each try. Between two steps, 256 bytes change places.
//
// Where a register has four lanes, it names two bits of a state, at first the newest. At 2 and 3 bits the next step brings
// none of them to an end, so that behind even steps bytes need to change places within registers only: the layout
// *alternates* between even and odd steps.
#pragma once

#include <cstdint>
#include <vector>

namespace fibkv {

constexpr int kStates = 256;
constexpr int kStateLanes = 16;  // of 16 bytes

// The largest cost in a byte. Of two ways costs are even, and the lowest bit of a sum says which way it is: the least sum
// brings it along.
template <int ways>
constexpr int kMostCost = ways == 2 ? 254 : 255;

// The search table for one cell; of two ways a line of the caches.
template <int ways>
struct alignas(ways == 2 ? 64 : 32) TrellisCell {
  uint8_t from[ways][16];  // for each row of a lane, the place in the lane that is tried
  uint8_t cost[ways][16];  // and what the step from there costs
};

struct TrellisLayout {
  // By the parity of a step.
  uint8_t held[2][kStates];    // the place of a state before it
  uint8_t states[2][kStates];  // the state at a place behind it
  uint8_t waiting[kStates];    // and at a place before an even one
  uint8_t order[2][kStates];   // for each place before it, that behind the last step: the same state's
  uint16_t arrivals[2][kStates];  // the same, with the state's newest symbol in the high byte
  // The change of places by registers of 16 bytes, unless it alternates: in b rounds a lane's bytes are shuffled so that
  // two lanes can exchange halves, and in the end they are put in order.
  uint8_t exchange[4][kStateLanes][16];
  uint8_t settle[kStateLanes][16];

  TrellisLayout(int bits, const std::vector<int>& columns, bool alternates);

 private:
  void find_exchanges(int bits, const uint8_t* places);
};

// The cells of a search table, columns and costs [cells][ways][rows], as a layout has them.
template <int ways>
std::vector<TrellisCell<ways>> trellis_cells(int bits, int cells, int rows, const uint8_t* columns, const uint8_t* costs) {
  std::vector<TrellisCell<ways>> laid(cells);
  for (int cell = 0; cell < cells; ++cell) {
    for (int way = 0; way < ways; ++way) {
      const int start = (cell * ways + way) * rows;
      for (int row = 0; row < 16; ++row) {
        laid[cell].from[way][row] = static_cast<uint8_t>((row & -(1 << bits)) + columns[start + row % rows]);
        const int cost = costs[start + row % rows];
        laid[cell].cost[way][row] = static_cast<uint8_t>(ways == 2 ? 2 * cost + way : cost);
      }
    }
  }
  return laid;
}

}  // namespace fibkv
