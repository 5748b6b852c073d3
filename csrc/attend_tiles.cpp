// Attention on one tile: float kernels for every codec on every instruction set, softmax, and the choice of integer
// kernels where the instruction set has them.
#include "attend_kernels.h"
#include "attend_pairs.h"
#include "rotate.h"
#include "vector.h"
#ifdef FIBKV_INTEGER
#include "integer_kernels.h"
#endif

namespace fibkv {
namespace FIBKV_ISA {
namespace {

// Up to so many queries per KV head, a sum across lanes for each is cheaper than transposing the tile.
constexpr int kFewQueries = 8;

// A number that a generic lambda can take as a constant.
template <int value>
struct Number {
  static constexpr int number = value;
};

#ifdef FIBKV_INTEGER
bool on_integers(const Side& side, int n) {
  return side.planes > 0 && side.order != Order::rows && n <= kIntegerQueries;
}
#endif

// ---- Norms and scales ----------------------------------------------------------------------------------------------

float half_at(const uint8_t* from) {
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
V load_part(const uint8_t* array, int index, int count) {
  constexpr int width = sizeof(V) / kLanes;
  if (index + kLanes <= count) return load<V>(array + index * width);
  V part = {};
  if (index < count) std::memcpy(&part, array + index * width, static_cast<size_t>(count - index) * width);
  return part;
}

// Factors [kTile] by which the decoded directions or numbers of a tile are multiplied; 0 behind its last token.
void factors_of(const Side& side, const Span& span, int first, float* factors) {
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

// ---- Decoding a tile to float32 rows -------------------------------------------------------------------------------

// The code bytes of one token in canonical order.
const uint8_t* code_row(const Side& side, const Span& span, int token, uint8_t* room) {
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
uint32_t index_at(const uint8_t* code, int bytes, int m, int bits) {
  const int bit = m * bits, from = bit >> 3;
  uint32_t window = 0;
  for (int i = 0; i < 4 && from + i < bytes; ++i) window |= static_cast<uint32_t>(code[from + i]) << (8 * i);
  return (window >> (bit & 7)) & ((1u << bits) - 1);
}

// The levels of a trellis: windows of the bit stream, which is a ring.
void walk_trellis(const Side& side, const uint8_t* code, float* row) {
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
void copy_rest(const Side& side, const uint8_t* code, int m, float* row) {
  for (; m < side.dim / side.block; ++m) {
    const float* word = side.codewords + static_cast<size_t>(index_at(code, side.code_bytes, m, side.bits)) * side.block;
    for (int j = 0; j < side.block; ++j) row[m * side.block + j] = word[j];
  }
}

// All codewords, those of whole bytes (three of them, where indices do not lie in single ones) at once.
template <int bits, int block>
void copy_codewords(const Side& side, const uint8_t* code, float* row) {
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

void direction(const Side& side, const uint8_t* code, float* row) {
  if (side.window != side.bits) return walk_trellis(side, code, row);
  if (side.bits == 8 && side.block == 2) return copy_codewords<8, 2>(side, code, row);
  if (side.bits == 8 && side.block == 4) return copy_codewords<8, 4>(side, code, row);
  if (side.bits == 6 && side.block == 2) return copy_codewords<6, 2>(side, code, row);
  copy_rest(side, code, 0, row);
}

// One vector of a form whose elements stand one after another; `dim` need not be a multiple of the lanes.
template <typename Narrow, vf (*widen)(Narrow)>
void widen_row(const uint8_t* from, int dim, float* row) {
  constexpr int width = sizeof(Narrow) / kLanes;
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(row + i, widen(load<Narrow>(from + i * width)));
  if (i < dim) {
    uint8_t rest[sizeof(Narrow)] = {};
    std::memcpy(rest, from + i * width, static_cast<size_t>(dim - i) * width);
    store(row + i, widen(load<Narrow>(rest)));
  }
}

vf same(vf numbers) { return numbers; }

vf from_int8(vsb numbers) { return __builtin_convertvector(widen(numbers), vf); }

void numbers(const Side& side, const uint8_t* code, float* row) {
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
void unpack_numbers(const Side& side, const uint8_t* code, uint8_t* to) {
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
void spread_grid(const uint8_t* grid, int i, int count, float* lows, float* steps) {
  const float low = half_at(grid), step = half_at(grid + 2);
  for (int j = i; j < i + count; ++j) {
    lows[j] = low;
    steps[j] = step;
  }
}

// Rows [tokens][padded_dim] of whole numbers on grids.
void decode_affine(const Side& side, const Span& span, int first, int tokens, float* rows) {
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

void rotate(const Rotation& rotation, const float* x, int n, float* y) { turn(rotation, true, x, n, y); }
void unrotate(const Rotation& rotation, const float* x, int n, float* y) { turn(rotation, false, x, n, y); }

void scale(float* row, int count, float factor) {
  for (int i = 0; i < count; ++i) row[i] *= factor;
}

void add_scaled(float* sum, const float* row, int count, float factor) {
  for (int i = 0; i < count; ++i) sum[i] += factor * row[i];
}

// A vector behind per-channel scales goes back to its original space: every group has scales of its own.
void undo_channels(const Side& side, const Span& span, float* row) {
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
float power_of(const Span& span) {
  const uint32_t bits = static_cast<uint32_t>(span.mean[0] + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

// The mean of a span [padded_dim] in the space of its codes.
void mean_of(const Side& side, const Span& span, float* mean) {
  const float power = power_of(span);
  const int width = padded_dim(side.dim);
  const uint8_t* numbers = reinterpret_cast<const uint8_t*>(span.mean + 1);
  for (int i = 0; i < width; i += kLanes) {
    store(mean + i, from_int8(load_part<vsb>(numbers, i, side.dim)) * splat(power));
  }
}

// Rows [tokens][padded_dim] in the space of the side.
void decode(const Side& side, const Span& span, int first, int tokens, float* rows) {
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

// ---- Scoring and mixing on decoded rows ----------------------------------------------------------------------------

// Rows of a tile as kernels read them, a vector at a time: decoded ones, or codes that widen as they are.
struct Decoded {
  const float* rows;
  int width;
  vf at(int token, int i) const { return load<vf>(rows + static_cast<size_t>(token) * width + i); }
};

template <typename Narrow, vf (*widen)(Narrow)>
struct Widened {
  const uint8_t* rows;
  size_t pitch;  // bytes
  vf at(int token, int i) const {
    return widen(load<Narrow>(rows + token * pitch + static_cast<size_t>(i) * (sizeof(Narrow) / kLanes)));
  }
};

// Dot products of n queries with `at_once` rows from row t on.
template <int n, int at_once, typename Rows>
void dots(const Rows& rows, int width, int t, const float* queries, float* logits) {
  vf sums[kLanes > n * at_once ? kLanes : n * at_once] = {};
  for (int i = 0; i < width; i += kLanes) {
    vf keys[at_once];
    for (int j = 0; j < at_once; ++j) keys[j] = rows.at(t + j, i);
    for (int q = 0; q < n; ++q) {
      const vf query = load<vf>(queries + q * width + i);
      for (int j = 0; j < at_once; ++j) sums[q * at_once + j] += keys[j] * query;
    }
  }
  float found[sizeof sums / sizeof(vf)];
  for (int first = 0; first < n * at_once; first += kLanes) store(found + first, totals(sums + first));
  for (int q = 0; q < n; ++q) std::memcpy(logits + q * kTile + t, found + q * at_once, at_once * sizeof(float));
}

template <int n, typename Rows>
void score_block(const Rows& rows, int width, int tokens, const float* queries, float* logits) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) dots<n, 4>(rows, width, t, queries, logits);
  for (; t < tokens; ++t) dots<n, 1>(rows, width, t, queries, logits);
}

template <typename Rows>
void score_rows(const Rows& rows, int width, int tokens, const float* queries, int n, float* logits) {
  int q = 0;
  for (; q + 4 <= n; q += 4) score_block<4>(rows, width, tokens, queries + q * width, logits + q * kTile);
  for (; q < n; ++q) score_block<1>(rows, width, tokens, queries + q * width, logits + q * kTile);
}

// Many queries: the tile is transposed to [width][kTile], so that a broadcast element of a query meets a vector of
// tokens and no sum runs across lanes.
template <int n>
void score_columns(const float* columns, int width, const float* queries, float* logits) {
  constexpr int strip = 4 * kLanes > kTile ? kTile : 4 * kLanes;
  for (int t = 0; t < kTile; t += strip) {
    vf sums[n][strip / kLanes] = {};
    for (int i = 0; i < width; ++i) {
      vf keys[strip / kLanes];
      for (int s = 0; s < strip / kLanes; ++s) keys[s] = load<vf>(columns + i * kTile + t + s * kLanes);
      for (int q = 0; q < n; ++q) {
        const vf element = splat(queries[q * width + i]);
        for (int s = 0; s < strip / kLanes; ++s) sums[q][s] += element * keys[s];
      }
    }
    for (int q = 0; q < n; ++q) {
      for (int s = 0; s < strip / kLanes; ++s) store(logits + q * kTile + t + s * kLanes, sums[q][s]);
    }
  }
}

void score_many(const float* rows, int width, int tokens, const float* queries, int n, float* logits, float* columns) {
  for (int t = 0; t < kTile; ++t) {
    for (int i = 0; i < width; ++i) columns[i * kTile + t] = t < tokens ? rows[static_cast<size_t>(t) * width + i] : 0;
  }
  int q = 0;
  for (; q + 4 <= n; q += 4) score_columns<4>(columns, width, queries + q * width, logits + q * kTile);
  for (; q < n; ++q) score_columns<1>(columns, width, queries + q * width, logits + q * kTile);
}

template <int n, typename Rows>
void mix_block(const Rows& rows, int width, int tokens, const float* weights, float* out) {
  constexpr int vectors = kLanes >= 16 ? 4 : 2;
  const auto strip = [&](int i, auto count) {
    constexpr int number = decltype(count)::number;
    vf sums[n][number];
    for (int q = 0; q < n; ++q) {
      for (int s = 0; s < number; ++s) sums[q][s] = load<vf>(out + q * width + i + s * kLanes);
    }
    for (int t = 0; t < tokens; ++t) {
      vf row[number];
      for (int s = 0; s < number; ++s) row[s] = rows.at(t, i + s * kLanes);
      for (int q = 0; q < n; ++q) {
        const vf weight = splat(weights[q * kTile + t]);
        for (int s = 0; s < number; ++s) sums[q][s] += weight * row[s];
      }
    }
    for (int q = 0; q < n; ++q) {
      for (int s = 0; s < number; ++s) store(out + q * width + i + s * kLanes, sums[q][s]);
    }
  };
  int i = 0;
  for (; i + vectors * kLanes <= width; i += vectors * kLanes) strip(i, Number<vectors>{});
  for (; i < width; i += kLanes) strip(i, Number<1>{});
}

template <typename Rows>
void mix_rows(const Rows& rows, int width, int tokens, const float* weights, int n, float* out) {
  int q = 0;
  for (; q + 4 <= n; q += 4) mix_block<4>(rows, width, tokens, weights + q * kTile, out + q * width);
  for (; q < n; ++q) mix_block<1>(rows, width, tokens, weights + q * kTile, out + q * width);
}

// As many bytes at `ahead` as the codes of a tile have.
void prefetch_codes(const Side& side, int first, int tokens, const uint8_t* ahead) {
  const size_t pitch = side.code_bytes;
  for (size_t at = first * pitch; at < (first + tokens) * pitch; at += 64) __builtin_prefetch(ahead + at, 0, 2);
}

// Calls visit(rows) with the codes themselves where few queries meet numbers that only have to be widened; whether it
// did. As many bytes are prefetched at `ahead`.
template <typename Visit>
bool in_place(const Side& side, const Span& span, int first, int tokens, int n, const uint8_t* ahead, Visit visit) {
  if (side.order != Order::rows || side.channels || side.dim % kPad || n > kFewQueries) return false;
  const size_t pitch = side.code_bytes;
  const uint8_t* rows = span.codes + first * pitch;
  prefetch_codes(side, first, tokens, ahead);
  switch (side.form) {
    case Form::f32:
      visit(Widened<vf, same>{rows, pitch});
      return true;
    case Form::f16:
      visit(Widened<vh, from_f16>{rows, pitch});
      return true;
    case Form::bf16:
      visit(Widened<vh, from_bf16>{rows, pitch});
      return true;
    case Form::int8:
      visit(Widened<vsb, from_int8>{rows, pitch});
      return true;
    case Form::fp8:
      visit(Widened<vb, from_e4m3>{rows, pitch});
      return true;
    default:
      return false;
  }
}

// ---- The table -----------------------------------------------------------------------------------------------------

size_t query_bytes(const Side& key, int n) { return static_cast<size_t>(n) * padded_dim(key.dim) * sizeof(float); }

size_t prepared_bytes(const Side& key, int n) {
#ifdef FIBKV_INTEGER
  // Means are met by the queries as they are.
  if (on_integers(key, n)) return integer_prepared_bytes(key, n) + (key.centered ? query_bytes(key, n) : 0);
#endif
  return query_bytes(key, n);
}

void prepare(const Side& key, const float* queries, int n, uint8_t* prepared) {
#ifdef FIBKV_INTEGER
  if (on_integers(key, n)) {
    integer_prepare(key, queries, n, prepared);
    if (!key.centered) return;
    prepared += integer_prepared_bytes(key, n);
  }
#endif
  std::memcpy(prepared, queries, query_bytes(key, n));
}

size_t scratch_floats(const Side& side, int n) {
  const size_t tile = static_cast<size_t>(kTile) * padded_dim(side.dim);
  return n > kFewQueries ? 2 * tile : tile;
}

// numbers[q][t] *= factor of token t: logits by the keys' scales, weights by the values'.
void scale_tokens(const Side& side, const Span& span, int first, int tokens, int n, float* numbers) {
  float factors[kTile];
  factors_of(side, span, first, factors);
  for (int q = 0; q < n; ++q) {
    for (int t = 0; t < tokens; ++t) numbers[q * kTile + t] *= factors[t];
  }
}

#ifdef FIBKV_INTEGER
// products[q] = <query q, mean of the span>, of queries [n][padded_dim].
template <int n>
void meet_mean(const Side& key, const Span& span, const float* queries, float* products) {
  const uint8_t* numbers = reinterpret_cast<const uint8_t*>(span.mean + 1);
  const int width = padded_dim(key.dim);
  vf sums[n] = {};
  for (int i = 0; i < width; i += kLanes) {
    const vf mean = from_int8(load_part<vsb>(numbers, i, key.dim));
    for (int q = 0; q < n; ++q) sums[q] += mean * load<vf>(queries + static_cast<size_t>(q) * width + i);
  }
  const float power = power_of(span);
  for (int q = 0; q < n; ++q) products[q] = power * total(sums[q]);
}

// products [n] of all queries with the mean of a span, 0 where vectors have none.
void meet_means(const Side& key, const Span& span, const uint8_t* prepared, int n, float* products) {
  if (!key.centered) {
    for (int q = 0; q < n; ++q) products[q] = 0;
    return;
  }
  const float* queries = reinterpret_cast<const float*>(prepared + integer_prepared_bytes(key, n));
  const size_t width = padded_dim(key.dim);
  int q = 0;
  for (; q + 4 <= n; q += 4) meet_mean<4>(key, span, queries + q * width, products + q);
  for (; q < n; ++q) meet_mean<1>(key, span, queries + q * width, products + q);
}
#endif

void score(const Side& key, const Span& span, int first, int tokens, const uint8_t* prepared, int n, float* logits,
           float* scratch, const uint8_t* ahead) {
#ifdef FIBKV_INTEGER
  if (on_integers(key, n)) {
    float norms[kTile], shifts[kIntegerQueries];
    factors_of(key, span, first, norms);
    meet_means(key, span, prepared, n, shifts);
    return integer_score(key, span, first, tokens, prepared, n, norms, shifts, logits, ahead);
  }
#endif
  const int width = padded_dim(key.dim);
  const float* queries = reinterpret_cast<const float*>(prepared);
  const bool done = in_place(key, span, first, tokens, n, ahead, [&](const auto& rows) {
    score_rows(rows, width, tokens, queries, n, logits);
  });
  if (done) {
    if (key.norm_bytes) scale_tokens(key, span, first, tokens, n, logits);
    return;
  }
  if (key.form == Form::klt && n <= kFewQueries) {
    prefetch_codes(key, first, tokens, ahead);
    score_pairs(key, span, first, tokens, queries, n, width, kTile, logits);
    return scale_tokens(key, span, first, tokens, n, logits);
  }
  decode(key, span, first, tokens, scratch);
  if (n > kFewQueries) {
    score_many(scratch, width, tokens, queries, n, logits, scratch + static_cast<size_t>(kTile) * width);
  } else {
    score_rows(Decoded{scratch, width}, width, tokens, queries, n, logits);
  }
}

void mix(const Side& value, const Span& span, int first, int tokens, float* weights, int n, float* out, float* scratch,
         const uint8_t* ahead) {
#ifdef FIBKV_INTEGER
  if (on_integers(value, n)) {
    float norms[kTile];
    factors_of(value, span, first, norms);
    return integer_mix(value, span, first, tokens, weights, n, norms, out, ahead);
  }
#endif
  const int width = padded_dim(value.dim);
  const bool done = in_place(value, span, first, tokens, n, ahead, [&](const auto& rows) {
    if (value.norm_bytes) scale_tokens(value, span, first, tokens, n, weights);
    mix_rows(rows, width, tokens, weights, n, out);
  });
  if (done) return;
  decode(value, span, first, tokens, scratch);
  mix_rows(Decoded{scratch, width}, width, tokens, weights, n, out);
}

void finish(const Side& value, const float* rows, int n, float* out) {
  const int width = padded_dim(value.dim);
#ifdef FIBKV_INTEGER
  if (on_integers(value, n)) {
    for (int q = 0; q < n; ++q) {
      for (int plane = 0; plane < value.planes; ++plane) {
        for (int unit = 0; unit < value.units(); ++unit) {
          out[q * width + unit * value.planes + plane] += rows[q * width + plane * value.units() + unit];
        }
      }
    }
    return;
  }
#endif
  for (int i = 0; i < n * width; ++i) out[i] += rows[i];
}

constexpr float kLowest = -__builtin_inff();

constexpr int kVectors = kTile / kLanes;

// Shifts, scales, caps and hides: logits [kTile] of one query as the softmax takes them.
void shape_logits(float* logits, int tokens, float bias, const Softmax& softmax, const Visibility& visible) {
  for (int t = 0; t < kTile; t += kLanes) {
    vf x = (load<vf>(logits + t) + splat(bias)) * splat(softmax.scale);
    if (softmax.softcap > 0) x = splat(softmax.softcap) * tanhv(x * splat(1.0f / softmax.softcap));
    store(logits + t, x);
  }
  int limit = visible.limit < tokens ? visible.limit : tokens;
  limit = limit < 0 ? 0 : limit;
  if (visible.allowed) {
    for (int t = 0; t < limit; ++t) logits[t] = visible.allowed[t] ? logits[t] : kLowest;
  }
  if (visible.added) {
    for (int t = 0; t < limit; ++t) logits[t] += visible.added[t];
  }
  for (int t = limit; t < kTile; ++t) logits[t] = kLowest;
}

// Raises the reference point where logit * scale + offset exceeds it; returns the factor by which earlier sums shrink.
float raise_top(const float* logits, float scale, float offset, Running& running) {
  vf most = load<vf>(logits) * splat(scale);
  for (int i = 1; i < kVectors; ++i) most = larger(most, load<vf>(logits + i * kLanes) * splat(scale));
  most += splat(offset);
  if (!any_above(most, splat(running.top))) return 1.0f;
  const float before = running.top;
  running.top = largest(most);
  const float shrink = expv(splat(before - running.top))[0];
  for (int i = 0; i < kPad; ++i) running.sums[i] *= shrink;
  return shrink;
}

bool sees_all(const Visibility& visible, int tokens) {
  return tokens == kTile && visible.limit >= kTile && !visible.allowed && !visible.added;
}

void soften(float* logits, int n, int tokens, const float* bias, const Softmax& softmax, const Visibility* visible,
            Running* running, float* shrink) {
  for (int q = 0; q < n; ++q) {
    float* row = logits + q * kTile;
    // Most tiles are whole, and scaled only: that is left to the exponential below.
    const bool plain = softmax.softcap == 0 && sees_all(visible[q], tokens);
    const float shift = bias ? bias[q] : 0.0f;
    if (!plain) shape_logits(row, tokens, shift, softmax, visible[q]);
    const float scale = plain ? softmax.scale : 1.0f, offset = plain ? softmax.scale * shift : 0.0f;
    shrink[q] = raise_top(row, scale, offset, running[q]);
    // A query that has seen nothing yet has no reference point: exp(-inf - 0) is 0.
    const vf top = splat(running[q].top == kLowest ? 0.0f : (running[q].top - offset) * kLog2e);
    const vf factor = splat(scale * kLog2e);
    vf sum = load<vf>(running[q].sums);
    for (int i = 0; i < kVectors; ++i) {
      const vf weight = exp2v(load<vf>(row + i * kLanes) * factor - top);
      store(row + i * kLanes, weight);
      sum += weight;
    }
    store(running[q].sums, sum);
  }
}

}  // namespace

const AttendKernels attend_kernels = {prepared_bytes, prepare, score, soften, mix,
                                      finish,         rotate, unrotate, scale, add_scaled, scratch_floats};

}  // namespace FIBKV_ISA
}  // namespace fibkv
