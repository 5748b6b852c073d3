#include "trellis_layout.h"

#include <cstring>

namespace fibkv {

TrellisLayout::TrellisLayout(int bits, const std::vector<int>& columns, bool alternates) {
  const int n = 1 << bits, groups = kStates >> bits;
  const auto mix_of = [&columns](int group) {
    int mix = 0;
    for (size_t bit = 0; bit < columns.size(); ++bit) mix ^= group >> bit & 1 ? columns[bit] : 0;
    return mix;
  };
  const auto first_of = [bits, n, alternates, mix_of](int group, int parity) {
    // At 2 bits a lane has four groups, and its 16 rows are those of all labels: each group stands where its rows are.
    const int shared = bits == 2 ? 2 : 0, width = 8 - bits - shared;
    int name = group >> shared;
    if (alternates && parity && bits < 4) name = (name & 3) << (width - 2) | name >> 2;
    return n * (bits == 2 ? name << shared | mix_of(group) >> 4 : name);
  };
  uint8_t reached[2][kStates], places[kStates];
  for (int parity = 0; parity < 2; ++parity) {
    for (int state = 0; state < kStates; ++state) {
      const int to = state >> bits, from = state & (groups - 1), symbol = state / groups;
      held[parity][state] = static_cast<uint8_t>(first_of(to, parity) + ((state ^ mix_of(to)) & (n - 1)));
      reached[parity][state] =
          static_cast<uint8_t>(first_of(from, parity) + ((symbol ^ mix_of(from) >> bits) & (n - 1)));
      states[parity][reached[parity][state]] = static_cast<uint8_t>(state);
    }
  }
  for (int state = 0; state < kStates; ++state) {
    for (int parity = 0; parity < 2; ++parity) {
      const uint8_t before = held[parity][state], behind = reached[1 - parity][state];
      order[parity][before] = behind;
      arrivals[parity][before] = static_cast<uint16_t>(state / groups << 8 | behind);
    }
    places[reached[0][state]] = held[1][state];
    waiting[held[0][state]] = static_cast<uint8_t>(state);
  }
  if (!alternates) find_exchanges(bits, places);
}

// Follows the bytes, whose places to go to are `places`, through the rounds. A lane has as many bytes with a bit of their
// symbol set as without it, and the symbol is in the high bits of the lane where a byte has to go.
void TrellisLayout::find_exchanges(int bits, const uint8_t* places) {
  uint8_t lanes[kStateLanes][16];
  std::memcpy(lanes, places, sizeof lanes);
  for (int round = 0; round < bits; ++round) {
    uint8_t sorted[kStateLanes][16];
    for (int lane = 0; lane < kStateLanes; ++lane) {
      int next[2] = {0, 8};
      for (int i = 0; i < 16; ++i) {
        const int at = next[lanes[lane][i] >> (8 - bits + round) & 1]++;
        exchange[round][lane][at] = static_cast<uint8_t>(i);
        sorted[lane][at] = lanes[lane][i];
      }
    }
    for (int lane = 0; lane < kStateLanes; ++lane) {
      const int upper = lane >> round & 1, pair = lane & ~(1 << round);
      std::memcpy(lanes[lane], sorted[pair] + 8 * upper, 8);
      std::memcpy(lanes[lane] + 8, sorted[pair | 1 << round] + 8 * upper, 8);
    }
  }
  for (int lane = 0; lane < kStateLanes; ++lane) {
    for (int i = 0; i < 16; ++i) settle[lane][lanes[lane][i] & 15] = static_cast<uint8_t>(i);
  }
}

}  // namespace fibkv
