// Pages: what a warp reads of them, and when.
#pragma once

#include "codes.cuh"

constexpr int STEPS = HEAD_DIM / 16, UNIT = 64, TILE = 16, TILES = UNIT / TILE;
constexpr int COLUMNS = 5;  // of a side's addresses: codes, norms, ranges, means, channel scales

using Key = Piece<static_cast<Form>(KEY_FORM), KEY_BITS, KEY_BLOCK, 4>;
using Value = Piece<static_cast<Form>(VALUE_FORM), VALUE_BITS, VALUE_BLOCK, 8>;
using KeyNorms = Norms<static_cast<Form>(KEY_FORM)>;
using ValueNorms = Norms<static_cast<Form>(VALUE_FORM)>;

// What a launch is about: whole numbers come as 64 bits and others as float64, as Python has them.
struct Sizes {
  int row0, head0, rows, heads, queries, length, start, spans, tokens, capacity, units_each, slot;
};

// The bytes of a page's mean: a lane has four of 128, and their power of two.
struct Mean {
  static constexpr int WORDS = (HEAD_DIM + 127) / 128;
  u32 words[WORDS];
  int exponent;

  __device__ __forceinline__ void read(const u8* head, int lane) {
    exponent = static_cast<signed char>(__ldg(head));
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      words[i] = 0;
      if (128 * i + 4 * lane >= HEAD_DIM) continue;
      // Not aligned: of the two words that have them.
      const u64 first = reinterpret_cast<u64>(head + 1 + 128 * i + 4 * lane);
      const u32* const from = reinterpret_cast<const u32*>(first & ~3ull);
      words[i] = __funnelshift_r(__ldg(from), first & 3 ? __ldg(from + 1) : 0, 8 * (first & 3));
    }
  }
  // Coordinates 4 j .. 4 j + 3 of piece c of four.
  __device__ __forceinline__ uint2 coordinates(int j, int c) const {
    const int word = c * STEPS + j;
    u32 numbers = __shfl_sync(ALL, words[0], word % 32);
    if (WORDS > 1) {
      const u32 others = __shfl_sync(ALL, words[WORDS - 1], word % 32);
      numbers = word < 32 ? numbers : others;
    }
    return from_int8(numbers);
  }
};

// The units of a warp: where they lie, and what has been read of the one at hand and the one that follows.
struct Units {
  const Sizes& sizes;
  const long long* addresses;
  int row, head, lane, stop, of_span;
  const u8 *key_codes, *value_codes;
  Key keys[2];
  Value values[4];
  KeyNorms key_norms;  // of tokens lane and lane + 32
  ValueNorms value_norms;
  Mean mean;
  u64 upcoming;  // the lane's column of the addresses of the unit that follows

  __device__ __forceinline__ Units(const Sizes& sizes, const long long* addresses, int row, int head, int lane)
      : sizes(sizes), addresses(addresses), row(row), head(head), lane(lane), upcoming(0) {
    of_span = (sizes.tokens + UNIT - 1) / UNIT;
    stop = min((static_cast<int>(blockIdx.x) + 1) * sizes.units_each, sizes.spans * of_span);
  }
  __device__ __forceinline__ int span(int unit) const { return of_span == 1 ? unit : unit / of_span; }
  __device__ __forceinline__ int begin(int unit) const { return of_span == 1 ? 0 : unit % of_span * UNIT; }
  // How far the last token of a span is from the first one of a unit.
  __device__ __forceinline__ int room(int unit) const { return sizes.tokens - 1 - begin(unit); }

  __device__ __forceinline__ void fetch(int unit) {
    if (unit < stop && lane < 2 * COLUMNS)
      upcoming = addresses[(static_cast<u64>(row) * sizes.spans + span(unit)) * (2 * COLUMNS) + lane];
  }
  __device__ __forceinline__ const u8* column(int index) const {
    return reinterpret_cast<const u8*>(__shfl_sync(ALL, upcoming, index));
  }
  __device__ __forceinline__ void read_norms(int unit) {
    const u64 first = static_cast<u64>(head) * sizes.capacity;
    const u8 *const of_keys = column(1), *const of_values = column(COLUMNS + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = min(begin(unit) + lane + 32 * i, sizes.tokens - 1);
      key_norms.read(i, of_keys, first + at);
      value_norms.read(i, of_values, first + at);
    }
    key_norms.read_range(column(2), head);
    value_norms.read_range(column(COLUMNS + 2), head);
    if (KEY_CENTERED) mean.read(column(3) + head * (1 + HEAD_DIM), lane);
  }
  __device__ __forceinline__ void open(int unit) {
    const u64 first = static_cast<u64>(head) * sizes.capacity + begin(unit);
    key_codes = column(0) + first * Key::VECTOR_BYTES;
    value_codes = column(COLUMNS) + first * Value::VECTOR_BYTES;
  }
  // Of a tile; if the unit is not WHOLE, its last token stands in for those behind it.
  template <bool WHOLE>
  __device__ __forceinline__ void read_keys(int tile, int last) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = tile * TILE + lane / 4 + 8 * i;
      keys[i].read(key_codes + (WHOLE ? token : min(token, last)) * Key::VECTOR_BYTES, lane % 4);
    }
  }
  template <bool WHOLE>
  __device__ __forceinline__ void read_values(int tile, int last) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * TILE + lane % 4 * 2 + i % 2 + 8 * (i / 2);
      values[i].read(value_codes + (WHOLE ? token : min(token, last)) * Value::VECTOR_BYTES, lane / 4);
    }
  }
  __device__ __forceinline__ void read_first_keys(int unit) {
    const int last = room(unit);
    if (last >= UNIT - 1)
      read_keys<true>(0, last);
    else
      read_keys<false>(0, last);
  }
  __device__ __forceinline__ void read_first_values(int unit) {
    const int last = room(unit);
    if (last >= UNIT - 1)
      read_values<true>(0, last);
    else
      read_values<false>(0, last);
  }
};
