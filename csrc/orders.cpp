#include "orders.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

namespace fibkv {
namespace {

// Tokens whose bytes share a lane of value tiles.
constexpr int kTokensPerLane = 4;

// A tile of keys, `count` of its tokens: words of 4 bytes change places, [count][words] with [words][kTokenTile].
// One address is written in order; the other stays within a few lines, since a tile has 16 rows.
template <bool to_tile>
void key_tile(std::conditional_t<to_tile, const uint8_t, uint8_t>* rows, int count, size_t bytes,
              std::conditional_t<to_tile, uint8_t, const uint8_t>* tile) {
  for (size_t j = 0; j < bytes; j += 4) {
    for (int t = 0; t < count; ++t) {
      if constexpr (to_tile) {
        std::memcpy(tile + j * kTokenTile + 4 * t, rows + t * bytes + j, 4);
      } else {
        std::memcpy(rows + t * bytes + j, tile + j * kTokenTile + 4 * t, 4);
      }
    }
  }
}

// `slice` bytes of each of four tokens, `pitch` apart, with as many lanes of one byte of each. Spelled as shifts of
// whole lanes, which compilers turn into interleaving of vectors.
template <int slice>
void value_lanes(const uint8_t* rows, size_t pitch, uint8_t* tile) {
  uint32_t lanes[slice];
  const uint8_t *a = rows, *b = a + pitch, *c = b + pitch, *d = c + pitch;
  for (int i = 0; i < slice; ++i) {
    lanes[i] = a[i] | uint32_t{b[i]} << 8 | uint32_t{c[i]} << 16 | uint32_t{d[i]} << 24;
  }
  std::memcpy(tile, lanes, sizeof lanes);
}

template <int slice>
void value_rows(const uint8_t* tile, uint8_t* rows, size_t pitch) {
  uint32_t lanes[slice];
  std::memcpy(lanes, tile, sizeof lanes);
  uint8_t *a = rows, *b = a + pitch, *c = b + pitch, *d = c + pitch;
  for (int i = 0; i < slice; ++i) a[i] = static_cast<uint8_t>(lanes[i]);
  for (int i = 0; i < slice; ++i) b[i] = static_cast<uint8_t>(lanes[i] >> 8);
  for (int i = 0; i < slice; ++i) c[i] = static_cast<uint8_t>(lanes[i] >> 16);
  for (int i = 0; i < slice; ++i) d[i] = static_cast<uint8_t>(lanes[i] >> 24);
}

// Calls visit(first byte of a slice, token, its place in the tiles) for every four tokens of a side in value tiles.
template <int slice, typename Visit>
void each_lane_group(const Side& side, int tokens, Visit visit) {
  const size_t bytes = side.code_bytes, padded = side.padded(tokens);
  for (size_t at = 0; at < bytes; at += slice) {
    for (int t = 0; t < tokens; t += kTokensPerLane) visit(at, t, at * padded + size_t{slice} * t);
  }
}

template <int slice>
void value_tiles_from_rows(const Side& side, int tokens, const uint8_t* rows, uint8_t* ordered) {
  const size_t bytes = side.code_bytes;
  each_lane_group<slice>(side, tokens, [&](size_t at, int t, size_t place) {
    const uint8_t* from = rows + t * bytes + at;
    if (tokens - t >= kTokensPerLane) return value_lanes<slice>(from, bytes, ordered + place);
    uint8_t last[kTokensPerLane * slice] = {};
    for (int i = 0; i < tokens - t; ++i) std::memcpy(last + i * slice, from + i * bytes, slice);
    value_lanes<slice>(last, slice, ordered + place);
  });
}

template <int slice>
void rows_from_value_tiles(const Side& side, int tokens, const uint8_t* ordered, uint8_t* rows) {
  const size_t bytes = side.code_bytes;
  each_lane_group<slice>(side, tokens, [&](size_t at, int t, size_t place) {
    uint8_t* to = rows + t * bytes + at;
    if (tokens - t >= kTokensPerLane) return value_rows<slice>(ordered + place, to, bytes);
    uint8_t last[kTokensPerLane * slice];
    value_rows<slice>(ordered + place, last, slice);
    for (int i = 0; i < tokens - t; ++i) std::memcpy(to + i * bytes, last + i * slice, slice);
  });
}

// Bytes of a unit that are kept apart; see Side::unit.
constexpr int kUnit = 3;

// The bytes of a token, units of three, to first, second and third bytes, and back.
void part_units(const uint8_t* __restrict row, int units, uint8_t* __restrict placed) {
  for (int u = 0; u < units; ++u) {
    for (int i = 0; i < kUnit; ++i) placed[i * units + u] = row[kUnit * u + i];
  }
}

void join_units(const uint8_t* __restrict placed, int units, uint8_t* __restrict row) {
  for (int u = 0; u < units; ++u) {
    for (int i = 0; i < kUnit; ++i) row[kUnit * u + i] = placed[i * units + u];
  }
}

void tiles_from_rows(const Side& side, int tokens, const uint8_t* rows, uint8_t* ordered) {
  const size_t bytes = side.code_bytes;
  switch (side.order) {
    case Order::rows:
      std::memcpy(ordered, rows, bytes * tokens);
      return;
    case Order::key_tiles:
      for (int t = 0; t < tokens; t += kTokenTile) {
        key_tile<true>(rows + t * bytes, std::min(kTokenTile, tokens - t), bytes, ordered + t * bytes);
      }
      return;
    case Order::value_tiles:
      if (side.slice == kValueSlice) return value_tiles_from_rows<kValueSlice>(side, tokens, rows, ordered);
      value_tiles_from_rows<8>(side, tokens, rows, ordered);
  }
}

void rows_from_tiles(const Side& side, int tokens, const uint8_t* ordered, uint8_t* rows) {
  const size_t bytes = side.code_bytes;
  switch (side.order) {
    case Order::rows:
      std::memcpy(rows, ordered, bytes * tokens);
      return;
    case Order::key_tiles:
      for (int t = 0; t < tokens; t += kTokenTile) {
        key_tile<false>(rows + t * bytes, std::min(kTokenTile, tokens - t), bytes, ordered + t * bytes);
      }
      return;
    case Order::value_tiles:
      if (side.slice == kValueSlice) return rows_from_value_tiles<kValueSlice>(side, tokens, ordered, rows);
      rows_from_value_tiles<8>(side, tokens, ordered, rows);
  }
}

}  // namespace

void put_in_order(const Side& side, int tokens, const uint8_t* rows, uint8_t* ordered) {
  if (side.unit == 1) return tiles_from_rows(side, tokens, rows, ordered);
  const size_t bytes = side.code_bytes;
  std::vector<uint8_t> placed(tokens * bytes);
  for (int t = 0; t < tokens; ++t) part_units(rows + t * bytes, side.units(), placed.data() + t * bytes);
  tiles_from_rows(side, tokens, placed.data(), ordered);
}

void put_in_rows(const Side& side, int tokens, const uint8_t* ordered, uint8_t* rows) {
  if (side.unit == 1) return rows_from_tiles(side, tokens, ordered, rows);
  const size_t bytes = side.code_bytes;
  std::vector<uint8_t> placed(tokens * bytes);
  rows_from_tiles(side, tokens, ordered, placed.data());
  for (int t = 0; t < tokens; ++t) join_units(placed.data() + t * bytes, side.units(), rows + t * bytes);
}

}  // namespace fibkv
