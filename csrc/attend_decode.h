// Norms of a tile, and the tile as float32 rows: every codec on every instruction set.
#pragma once

#include "attend_kernels.h"
#include "attend_pairs.h"
#include "rotate.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

static float half_at(const uint8_t* from) {
  uint16_t bits;
  std::memcpy(&bits, from, 2);
#if defined(__AVX2__)
  return _cvtsh_ss(bits);
#else
  return from_f16(__builtin_convertvector(splat(static_cast<int32_t>(bits)), vh))[0];
#endif
}

// A vector of elements [index, index + kLanes) of an array of `count`; what lies behind its end is zero.
template <typename V>
static V load_part(const uint8_t* array, int index, int count) {
  constexpr int width = sizeof(V) / kLanes;
  if (index + kLanes <= count) return load<V>(array + index * width);
  V part = {};
  if (index < count) std::memcpy(&part, array + index * width, static_cast<size_t>(count - index) * width);
  return part;
}

// Factors [kTile] by which the decoded directions or numbers of a tile are multiplied; 0 behind its last token.
static void factors_of(const Side& side, const Span& span, int first, float* factors) {
  if (side.log_norms) {
    const vf low = splat(half_at(span.range)), step = splat(half_at(span.range + 2));
    for (int t = 0; t < kTile; t += kLanes) {
      const vi codes = widen(load_part<vb>(span.norms, first + t, span.padded));
      const vf logs = __builtin_convertvector(codes - splat(1), vf) * step + low;
      store(factors + t, codes == splat(0) ? splat(0.0f) : exp2v(logs));
    }
    return;
  }
  for (int t = 0; t < kTile; t += kLanes) {
    const vh bits = load_part<vh>(span.norms, first + t, span.padded);
    store(factors + t, side.form == Form::fib ? from_f16(bits) : from_bf16(bits));
  }
}

// The code bytes of one token in canonical order.
static const uint8_t* code_row(const Side& side, const Span& span, int token, uint8_t* room) {
  const int bytes = side.code_bytes;
  switch (side.order) {
    case Order::rows:
      return span.codes + static_cast<size_t>(token) * bytes;
    case Order::key_tiles: {
      const uint8_t* from = span.codes + static_cast<size_t>(token / kTokenTile) * bytes * kTokenTile +
                            static_cast<size_t>(token % kTokenTile) * 4;
      if (side.unit == 1) {
        for (int j = 0; j < bytes; j += 4) std::memcpy(room + j, from + static_cast<size_t>(j) * kTokenTile, 4);
        return room;
      }
      for (int i = 0; i < side.unit; ++i) {
        for (int u = 0; u < side.units(); ++u) {
          const int place = side.place(u, i), byte = place % 4;
          room[u * side.unit + i] = from[static_cast<size_t>(place - byte) * kTokenTile + byte];
        }
      }
      return room;
    }
    default: {
      const uint8_t* from = span.codes + static_cast<size_t>(token / 4) * 4 * side.slice + token % 4;
      for (int i = 0; i < side.unit; ++i) {
        for (int u = 0; u < side.units(); ++u) {
          const int place = side.place(u, i), lane = place % side.slice;
          room[u * side.unit + i] = from[static_cast<size_t>(place - lane) * span.padded + 4 * lane];
        }
      }
      return room;
    }
  }
}

// The code of width `bits` at index m of a little-endian bit stream of `bytes` bytes.
static uint32_t index_at(const uint8_t* code, int bytes, int m, int bits) {
  const int bit = m * bits, from = bit >> 3;
  uint32_t window = 0;
  for (int i = 0; i < 4 && from + i < bytes; ++i) window |= static_cast<uint32_t>(code[from + i]) << (8 * i);
  return (window >> (bit & 7)) & ((1u << bits) - 1);
}

// The levels of a trellis: windows of the bit stream, which is a ring.
static void walk_trellis(const Side& side, const uint8_t* code, float* row) {
  constexpr int before = 2, behind = 4;  // bytes that the first window reaches back, and a load reaches on
  uint8_t ring[before + 4096 / 2 + behind];
  std::memcpy(ring, code + side.code_bytes - before, before);
  std::memcpy(ring + before, code, side.code_bytes);
  const int mask = (1 << side.window) - 1, start = 8 * before + side.bits - side.window;
  vi places{};
  for (int i = 0; i < kLanes; ++i) places[i] = start + i * side.bits;
  int m = 0;
  for (; m + kLanes <= side.dim; m += kLanes) {
    const vi bit = places + splat(m * side.bits);
    const vu bytes = (vu)gather_bytes(ring, bit >> 3);
    store(row + m, as_float(gather(side.codewords, (vi)(bytes >> (vu)(bit & splat(7))) & splat(mask))));
  }
  for (; m < side.dim; ++m) {
    const int bit = start + m * side.bits;
    uint32_t bytes;
    std::memcpy(&bytes, ring + bit / 8, sizeof bytes);
    row[m] = side.codewords[bytes >> (bit % 8) & mask];
  }
}

// Codewords from number m on, indices one by one.
static void copy_rest(const Side& side, const uint8_t* code, int m, float* row) {
  for (; m < side.dim / side.block; ++m) {
    const float* word = side.codewords + static_cast<size_t>(index_at(code, side.code_bytes, m, side.bits)) * side.block;
    for (int j = 0; j < side.block; ++j) row[m * side.block + j] = word[j];
  }
}

// All codewords, those of whole bytes (three of them, where indices do not lie in single ones) at once.
template <int bits, int block>
static void copy_codewords(const Side& side, const uint8_t* code, float* row) {
  constexpr int unit = 8 % bits ? 3 : 1, count = 8 * unit / bits;
  const int whole = side.dim / block / count;
  for (int u = 0; u < whole; ++u) {
    uint32_t indices = code[u * unit];
    for (int i = 1; i < unit; ++i) indices |= static_cast<uint32_t>(code[u * unit + i]) << (8 * i);
    for (int i = 0; i < count; ++i) {
      const uint32_t index = indices >> (bits * i) & ((1u << bits) - 1);
      std::memcpy(row + (u * count + i) * block, side.codewords + index * block, block * sizeof(float));
    }
  }
  copy_rest(side, code, whole * count, row);
}

static void direction(const Side& side, const uint8_t* code, float* row) {
  if (side.window != side.bits) return walk_trellis(side, code, row);
  if (side.bits == 8 && side.block == 2) return copy_codewords<8, 2>(side, code, row);
  if (side.bits == 8 && side.block == 4) return copy_codewords<8, 4>(side, code, row);
  if (side.bits == 6 && side.block == 2) return copy_codewords<6, 2>(side, code, row);
  copy_rest(side, code, 0, row);
}

// One vector of a form whose elements stand one after another; `dim` need not be a multiple of the lanes.
template <typename Narrow, vf (*widen)(Narrow)>
static void widen_row(const uint8_t* from, int dim, float* row) {
  constexpr int width = sizeof(Narrow) / kLanes;
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(row + i, widen(load<Narrow>(from + i * width)));
  if (i < dim) {
    uint8_t rest[sizeof(Narrow)] = {};
    std::memcpy(rest, from + i * width, static_cast<size_t>(dim - i) * width);
    store(row + i, widen(load<Narrow>(rest)));
  }
}

static vf same(vf numbers) { return numbers; }

static vf from_int8(vsb numbers) { return __builtin_convertvector(widen(numbers), vf); }

static void numbers(const Side& side, const uint8_t* code, float* row) {
  switch (side.form) {
    case Form::f32:
      std::memcpy(row, code, static_cast<size_t>(side.dim) * 4);
      return;
    case Form::f16:
      return widen_row<vh, from_f16>(code, side.dim, row);
    case Form::bf16:
      return widen_row<vh, from_bf16>(code, side.dim, row);
    case Form::int8:
      return widen_row<vsb, from_int8>(code, side.dim, row);
    case Form::fp8:
      return widen_row<vb, from_e4m3>(code, side.dim, row);
    case Form::fib:
      return direction(side, code, row);
    case Form::affine:
    case Form::klt:
      return;  // decode_affine, decode_pairs
  }
}

// The numbers of one vector, each `bits` wide, to `to` with room for 7 more than the dimension.
static void unpack_numbers(const Side& side, const uint8_t* code, uint8_t* to) {
  if (side.bits == 4) {
    for (int j = 0; j < side.code_bytes; ++j) {
      to[2 * j] = code[j] & 15;
      to[2 * j + 1] = code[j] >> 4;
    }
  } else if (side.bits == 2) {
    for (int j = 0; j < side.code_bytes; ++j) {
      for (int i = 0; i < 4; ++i) to[4 * j + i] = code[j] >> (2 * i) & 3;
    }
  } else {
    for (int i = 0; i < side.dim; ++i) to[i] = static_cast<uint8_t>(index_at(code, side.code_bytes, i, side.bits));
  }
}

// `count` elements from i on share the grid at `grid`.
static void spread_grid(const uint8_t* grid, int i, int count, float* lows, float* steps) {
  const float low = half_at(grid), step = half_at(grid + 2);
  for (int j = i; j < i + count; ++j) {
    lows[j] = low;
    steps[j] = step;
  }
}

// Rows [tokens][padded_dim] of whole numbers on grids.
static void decode_affine(const Side& side, const Span& span, int first, int tokens, float* rows) {
  float lows[padded_dim(4096)], steps[padded_dim(4096)];
  uint8_t whole[padded_dim(4096) + 8];
  const int width = padded_dim(side.dim);
  for (int i = 0; i < width; ++i) lows[i] = steps[i] = whole[i] = 0;
  if (side.channels) {
    for (int i = 0; i < side.dim; ++i) spread_grid(span.channels + 4 * i, i, 1, lows, steps);
  }
  for (int t = 0; t < tokens; ++t) {
    unpack_numbers(side, span.codes + static_cast<size_t>(first + t) * side.code_bytes, whole);
    if (!side.channels) {
      const uint8_t* grid = span.norms + static_cast<size_t>(first + t) * side.norm_bytes;
      for (int i = 0; i < side.dim; i += side.block, grid += 4) {
        spread_grid(grid, i, i + side.block < side.dim ? side.block : side.dim - i, lows, steps);
      }
    }
    for (int i = 0; i < width; i += kLanes) {
      const vf numbers = __builtin_convertvector(widen(load<vb>(whole + i)), vf);
      store(rows + static_cast<size_t>(t) * width + i, load<vf>(lows + i) + load<vf>(steps + i) * numbers);
    }
  }
}

static void rotate(const Rotation& rotation, const float* x, int n, float* y) { turn(rotation, true, x, n, y); }
static void unrotate(const Rotation& rotation, const float* x, int n, float* y) { turn(rotation, false, x, n, y); }

static void scale(float* row, int count, float factor) {
  for (int i = 0; i < count; ++i) row[i] *= factor;
}

static void add_scaled(float* sum, const float* row, int count, float factor) {
  for (int i = 0; i < count; ++i) sum[i] += factor * row[i];
}

// A vector behind per-channel scales goes back to its original space: every group has scales of its own.
static void undo_channels(const Side& side, const Span& span, float* row) {
  float turned[padded_dim(4096)];
  const float* from = row;
  if (side.rotation) {
    unrotate(*side.rotation, row, 1, turned);
    from = turned;
  }
  for (int i = 0; i < side.dim; ++i) {
    uint16_t bits;
    std::memcpy(&bits, span.channels + 2 * i, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float factor;
    std::memcpy(&factor, &wide, 4);
    row[i] = from[i] * factor;
  }
}

// What multiplies the numbers of a span's mean.
static float power_of(const Span& span) {
  const uint32_t bits = static_cast<uint32_t>(span.mean[0] + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

// The mean of a span [padded_dim] in the space of its codes.
static void mean_of(const Side& side, const Span& span, float* mean) {
  const float power = power_of(span);
  const int width = padded_dim(side.dim);
  const uint8_t* numbers = reinterpret_cast<const uint8_t*>(span.mean + 1);
  for (int i = 0; i < width; i += kLanes) {
    store(mean + i, from_int8(load_part<vsb>(numbers, i, side.dim)) * splat(power));
  }
}

// Rows [tokens][padded_dim] in the space of the side.
static void decode(const Side& side, const Span& span, int first, int tokens, float* rows) {
  if (side.form == Form::affine) return decode_affine(side, span, first, tokens, rows);
  float factors[kTile], mean[padded_dim(4096)];
  uint8_t room[4 * 4096];
  const int width = padded_dim(side.dim);
  if (side.centered) mean_of(side, span, mean);
  if (side.norm_bytes) factors_of(side, span, first, factors);
  for (int t = 0; t < tokens; ++t) {
    float* row = rows + static_cast<size_t>(t) * width;
    for (int i = width - kPad; i < width; ++i) row[i] = 0;
    const uint8_t* code = code_row(side, span, first + t, room);
    if (side.form == Form::klt) {
      decode_pairs(span.sections, code, side.code_bytes, row);
    } else {
      numbers(side, code, row);
    }
    if (side.norm_bytes) scale(row, side.dim, factors[t]);
    if (side.centered) add_scaled(row, mean, side.dim, 1.0f);
    if (side.channels) undo_channels(side, span, row);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
