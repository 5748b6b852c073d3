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

// 16 bytes of each of four tokens, `pitch` apart, with 16 lanes of one byte of each. Spelled as shifts of whole lanes,
// which compilers turn into interleaving of vectors.
void value_lanes(const uint8_t* rows, size_t pitch, uint8_t* tile) {
  uint32_t lanes[kValueSlice];
  const uint8_t *a = rows, *b = a + pitch, *c = b + pitch, *d = c + pitch;
  for (int i = 0; i < kValueSlice; ++i) {
    lanes[i] = a[i] | uint32_t{b[i]} << 8 | uint32_t{c[i]} << 16 | uint32_t{d[i]} << 24;
  }
  std::memcpy(tile, lanes, sizeof lanes);
}

void value_rows(const uint8_t* tile, uint8_t* rows, size_t pitch) {
  uint32_t lanes[kValueSlice];
  std::memcpy(lanes, tile, sizeof lanes);
  uint8_t *a = rows, *b = a + pitch, *c = b + pitch, *d = c + pitch;
  for (int i = 0; i < kValueSlice; ++i) a[i] = static_cast<uint8_t>(lanes[i]);
  for (int i = 0; i < kValueSlice; ++i) b[i] = static_cast<uint8_t>(lanes[i] >> 8);
  for (int i = 0; i < kValueSlice; ++i) c[i] = static_cast<uint8_t>(lanes[i] >> 16);
  for (int i = 0; i < kValueSlice; ++i) d[i] = static_cast<uint8_t>(lanes[i] >> 24);
}

// Calls visit(slice of 16 bytes, token, its place in the tiles) for every four tokens of a side in value tiles.
template <typename Visit>
void each_lane_group(const Side& side, int tokens, Visit visit) {
  const size_t bytes = side.code_bytes, padded = side.padded(tokens);
  for (size_t slice = 0; slice < bytes; slice += kValueSlice) {
    for (int t = 0; t < tokens; t += kTokensPerLane) visit(slice, t, slice * padded + size_t{16} * t);
  }
}

// Calls visit(offset in rows, offset in rows whose bytes stand at their `place`) for every code byte.
template <typename Visit>
void each_byte(const Side& side, int tokens, Visit visit) {
  for (int t = 0; t < tokens; ++t) {
    const size_t row = static_cast<size_t>(t) * side.code_bytes;
    for (int u = 0; u < side.units(); ++u) {
      for (int i = 0; i < side.unit; ++i) visit(row + u * side.unit + i, row + side.place(u, i));
    }
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
      each_lane_group(side, tokens, [&](size_t slice, int t, size_t place) {
        const uint8_t* from = rows + t * bytes + slice;
        if (tokens - t >= kTokensPerLane) return value_lanes(from, bytes, ordered + place);
        uint8_t last[kTokensPerLane * kValueSlice] = {};
        for (int i = 0; i < tokens - t; ++i) std::memcpy(last + i * kValueSlice, from + i * bytes, kValueSlice);
        value_lanes(last, kValueSlice, ordered + place);
      });
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
      each_lane_group(side, tokens, [&](size_t slice, int t, size_t place) {
        uint8_t* to = rows + t * bytes + slice;
        if (tokens - t >= kTokensPerLane) return value_rows(ordered + place, to, bytes);
        uint8_t last[kTokensPerLane * kValueSlice];
        value_rows(ordered + place, last, kValueSlice);
        for (int i = 0; i < tokens - t; ++i) std::memcpy(to + i * bytes, last + i * kValueSlice, kValueSlice);
      });
  }
}

}  // namespace

void put_in_order(const Side& side, int tokens, const uint8_t* rows, uint8_t* ordered) {
  if (side.unit == 1) return tiles_from_rows(side, tokens, rows, ordered);
  std::vector<uint8_t> placed(static_cast<size_t>(tokens) * side.code_bytes);
  each_byte(side, tokens, [&](size_t from, size_t to) { placed[to] = rows[from]; });
  tiles_from_rows(side, tokens, placed.data(), ordered);
}

void put_in_rows(const Side& side, int tokens, const uint8_t* ordered, uint8_t* rows) {
  if (side.unit == 1) return rows_from_tiles(side, tokens, ordered, rows);
  std::vector<uint8_t> placed(static_cast<size_t>(tokens) * side.code_bytes);
  rows_from_tiles(side, tokens, ordered, placed.data());
  each_byte(side, tokens, [&](size_t to, size_t from) { rows[to] = placed[from]; });
}

}  // namespace fibkv
