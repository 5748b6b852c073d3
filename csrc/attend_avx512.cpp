// Scoring and mixing on the codes with AVX-512: byte tables in registers, four-way byte products.
#include <immintrin.h>

#include <cstring>

#include "byte_tables.h"
#include "integer_blocks.h"
#include "integer_kernels.h"
#include "number.h"

namespace fibkv {
namespace FIBKV_ISA {
namespace {

constexpr int kLanes = 16;

// sums + four-way products of unsigned and signed bytes. Written out, because GCC 12 copies the sums of the intrinsic
// from register to register; by value, because it keeps an array in memory that an asm statement writes to.
inline __m512i plus_products(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sums;
}

inline __m512i plus_products(__m512i sums, __m512i unsigned_bytes, const int32_t& four_signed_bytes) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "m"(four_signed_bytes));
  return sums;
}

// A product takes four cycles, and one can begin in each: so many sums keep the units busy. More are slower on Zen 4,
// whose third operands have to come fresh from another operation to leave the permutes of the look-ups theirs.
constexpr int kSums = 4;

// Queries of a side, quantized to bytes: for each block of at most eight queries
//   float step[8]; int32 start[8]; int32 bytes[planes][units / 4][queries of the block]
// A query is step * bytes, and `start` undoes the 128 that the unsigned keys are raised by.
// int8 keys are met by two bytes of the query, high and low, as two planes.
struct Prepared {
  float* step;
  int32_t* start;
  int32_t* bytes;
};

int query_planes(const Side& side) { return side.form == Form::int8 ? 2 : side.planes; }

size_t block_bytes(const Side& side) {
  return kMostQueries * (sizeof(float) + 2 * sizeof(int32_t) +
                         static_cast<size_t>(query_planes(side)) * side.units());
}

Prepared block_at(const Side& side, const uint8_t* prepared, int index) {
  uint8_t* at = const_cast<uint8_t*>(prepared) + index * block_bytes(side);
  return {reinterpret_cast<float*>(at), reinterpret_cast<int32_t*>(at + 4 * kMostQueries),
          reinterpret_cast<int32_t*>(at + 12 * kMostQueries)};
}

float largest_magnitude(const float* row, int width) {
  __m512 top = _mm512_setzero_ps();
  for (int i = 0; i < width; i += kLanes) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(row + i)));
  return _mm512_reduce_max_ps(top);
}

// Puts the bytes of a query, one a unit, where the products of plane `plane` read them; returns their sum.
int put_plane(const Prepared& block, const Side& side, int n, int q, int plane, const int8_t* numbers) {
  const int units = side.units();
  int32_t* to = block.bytes + static_cast<size_t>(plane) * (units / 4) * n + q;
  int sum = 0;
  for (int unit = 0; unit < units; ++unit) sum += numbers[unit];
  for (int unit = 0; unit < units; unit += 4, to += n) std::memcpy(to, numbers + unit, 4);
  return sum;
}

// The coordinates of each plane side by side.
void part_planes(const int8_t* numbers, int units, int planes, int8_t* parted) {
  with_planes(planes, [&](auto count) {
    for (int plane = 0; plane < count; ++plane) {
      for (int unit = 0; unit < units; ++unit) parted[plane * units + unit] = numbers[unit * count + plane];
    }
  });
}

void quantize_query(const Prepared& block, const Side& side, int n, int q, const float* row) {
  const bool wide = side.form == Form::int8;
  const int width = padded_dim(side.dim);
  const float top = largest_magnitude(row, width);
  const float limit = wide ? 32512.0f : 127.0f;  // 127 * 256: the high byte stays in range
  const __m512 inverse = _mm512_set1_ps(top > 0 ? limit / top : 0);
  int8_t numbers[kMostTiledDim], high[kMostTiledDim];
  for (int i = 0; i < width; i += kLanes) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), inverse));
    // value = 256 * high + low, with low in -128..127: its low byte.
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers + i), _mm512_cvtepi32_epi8(whole));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(upper));
  }
  block.step[q] = top / limit * side.plane_step;
  if (wide) {
    block.start[q] = -128 * put_plane(block, side, n, q, 0, high);
    block.start[kMostQueries + q] = -128 * put_plane(block, side, n, q, 1, numbers);
    return;
  }
  int8_t parted[kMostTiledDim];
  part_planes(numbers, side.units(), side.planes, parted);
  block.start[q] = 0;
  for (int plane = 0; plane < side.planes; ++plane) {
    block.start[q] -= 128 * put_plane(block, side, n, q, plane, parted + plane * side.units());
  }
}

// ---- Keys ----------------------------------------------------------------------------------------------------------

template <int n>
inline void add_products(__m512i* sums, __m512i keys, const int32_t* queries) {
  for (int q = 0; q < n; ++q) sums[q] = plus_products(sums[q], keys, queries[q]);
}

// Integer sums [groups][n] of 16 tokens each over two planes of a table.
template <typename Tables, int n>
void score_pair(const Side& side, const uint8_t* codes, int groups, int pair, const Prepared& block, __m512i* sums,
                const uint8_t* ahead) {
  Tables tables(side, pair, int8_t(-128));
  constexpr int unit = Tables::unit;
  const int steps = side.units() / 4;
  const int32_t* queries = block.bytes + static_cast<size_t>(2 * pair) * steps * n;
  // Few queries need sums of their own for the odd plane.
  constexpr int odd = n < kSums ? n : 0;
  for (int group = 0; group < groups; ++group) {
    __m512i found[n + odd];
    for (int q = 0; q < n; ++q) found[q] = pair ? sums[group * n + q] : _mm512_set1_epi32(block.start[q]);
    for (int q = 0; q < odd; ++q) found[n + q] = _mm512_setzero_si512();
    // The code is a ring: before its first bytes are its last.
    const size_t first = static_cast<size_t>(group) * unit * steps;
    __m512i last = _mm512_loadu_si512(codes + (first + unit * steps - 1) * 64);
    const auto look_up = [&](int j) {
      __m512i bytes[unit];
#pragma GCC unroll 3
      for (int i = 0; i < unit; ++i) {
        const size_t at = (first + i * steps + j) * 64;
        if (pair == 0) _mm_prefetch(ahead + at, _MM_HINT_T1);
        bytes[i] = _mm512_loadu_si512(codes + at);
      }
      tables.look_up(bytes, _mm512_shldi_epi32(bytes[unit - 1], last, 8));
      last = bytes[unit - 1];
    };
    look_up(0);
    for (int j = 0; j < steps; ++j) {
      const __m512i x = tables.x, y = tables.y;
      if (j + 1 < steps) look_up(j + 1);  // beside the products, not in front of them
      add_products<n>(found, x, queries + j * n);
      add_products<n>(found + odd, y, queries + (steps + j) * n);
    }
    for (int q = 0; q < n; ++q) sums[group * n + q] = odd ? _mm512_add_epi32(found[q], found[odd + q]) : found[q];
  }
}

template <typename Tables, int n>
void score_table(const Side& side, const uint8_t* codes, int groups, const Prepared& block, const float* norms,
                 const float* shifts, float* logits, const uint8_t* ahead) {
  __m512i sums[kTile / kLanes * n];
  for (int pair = 0; pair < side.planes / 2; ++pair) {
    score_pair<Tables, n>(side, codes, groups, pair, block, sums, ahead);
  }
  for (int group = 0; group < groups; ++group) {
    const __m512 norm = _mm512_loadu_ps(norms + group * kLanes);
    for (int q = 0; q < n; ++q) {
      const __m512 factor = _mm512_mul_ps(norm, _mm512_set1_ps(block.step[q]));
      const __m512 whole = _mm512_cvtepi32_ps(sums[group * n + q]), shift = _mm512_set1_ps(shifts[q]);
      _mm512_storeu_ps(logits + q * kTile + group * kLanes, _mm512_fmadd_ps(whole, factor, shift));
    }
  }
}

template <int n>
void score_int8(const Side& side, const uint8_t* codes, int groups, const Prepared& block, const float* norms,
                const float* shifts, float* logits, const uint8_t* ahead) {
  const int steps = side.code_bytes / 4;
  const int32_t* queries = block.bytes;
  const __m512i raise = _mm512_set1_epi8(int8_t(-128));
  for (int group = 0; group < groups; ++group) {
    __m512i high[n], low[n];
    for (int q = 0; q < n; ++q) {
      high[q] = _mm512_set1_epi32(block.start[q]);
      low[q] = _mm512_set1_epi32(block.start[kMostQueries + q]);
    }
    for (int j = 0; j < steps; ++j) {
      const size_t at = (static_cast<size_t>(group) * steps + j) * 64;
      const __m512i keys = _mm512_xor_si512(_mm512_loadu_si512(codes + at), raise);
      _mm_prefetch(ahead + at, _MM_HINT_T1);
      add_products<n>(high, keys, queries + j * n);
      add_products<n>(low, keys, queries + (steps + j) * n);
    }
    const __m512 norm = _mm512_loadu_ps(norms + group * kLanes);
    for (int q = 0; q < n; ++q) {
      const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[q]), _mm512_set1_ps(256.0f),
                                           _mm512_cvtepi32_ps(low[q]));
      const __m512 factor = _mm512_mul_ps(norm, _mm512_set1_ps(block.step[q]));
      const __m512 shift = _mm512_set1_ps(shifts[q]);
      _mm512_storeu_ps(logits + q * kTile + group * kLanes, _mm512_fmadd_ps(whole, factor, shift));
    }
  }
}

template <int n>
void score_block(const Side& side, const uint8_t* codes, int groups, const Prepared& block, const float* norms,
                 const float* shifts, float* logits, const uint8_t* ahead) {
  if (side.form == Form::int8) return score_int8<n>(side, codes, groups, block, norms, shifts, logits, ahead);
  with_tables(side, [&](auto kind) {
    score_table<typename decltype(kind)::Tables, n>(side, codes, groups, block, norms, shifts, logits, ahead);
  });
}

// ---- Values --------------------------------------------------------------------------------------------------------

// Weights of a tile as bytes: weight = step * (256 * high + low), with high unused for tables.
struct Weights {
  alignas(64) uint8_t high[kMostQueries][kTile];
  alignas(64) uint8_t low[kMostQueries][kTile];
  float step[kMostQueries];
};

void quantize_weights(const float* weights, const float* norms, bool wide, int q, Weights& bytes) {
  __m512 parts[4];
  __m512 most = _mm512_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    parts[i] = _mm512_mul_ps(_mm512_loadu_ps(weights + kLanes * i), _mm512_loadu_ps(norms + kLanes * i));
    most = _mm512_max_ps(most, parts[i]);
  }
  const float top = _mm512_reduce_max_ps(most);
  const float limit = wide ? 65535.0f : 255.0f;
  const __m512 inverse = _mm512_set1_ps(top > 0 ? limit / top : 0);
  bytes.step[q] = top * (1.0f / limit);
  for (int i = 0; i < 4; ++i) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(parts[i], inverse));
    const __m128i low = _mm512_cvtepi32_epi8(whole);
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes.low[q] + kLanes * i), low);
    if (wide) {
      const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8));
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes.high[q] + kLanes * i), high);
    }
  }
}

inline __m512i four_weights(const uint8_t* bytes) {
  int32_t word;
  std::memcpy(&word, bytes, 4);
  return _mm512_set1_epi32(word);
}

inline void add_scaled(float* out, __m512i sums, float step) {
  _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(step), _mm512_loadu_ps(out)));
}

// A register of value tiles: 16 units of four tokens, or 8 of eight.
struct Wide {
  static constexpr int units = 16, tokens = 4;
  static __m512i weights(const uint8_t* bytes) { return four_weights(bytes); }
  static void add(float* out, __m512i sums, float step) { add_scaled(out, sums, step); }
};

struct Narrow {
  static constexpr int units = 8, tokens = 8;

  // Of the first four tokens to the lower lanes, of the others to the upper ones.
  static __m512i weights(const uint8_t* bytes) {
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_permutexvar_epi32(halves, _mm512_castsi128_si512(eight));
  }

  static void add(float* out, __m512i sums, float step) {
    const __m256i whole = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(step));
    _mm256_storeu_ps(out, _mm256_add_ps(scaled, _mm256_loadu_ps(out)));
  }
};

template <typename Tables, typename Slice, int n>
void mix_pair(const Side& side, const uint8_t* codes, size_t pitch, int tokens, int pair, const Weights& weights,
              float* out, int width, const uint8_t* ahead) {
  Tables tables(side, pair, 0);
  constexpr int unit = Tables::unit;
  const int units = side.units(), slices = units / Slice::units;
  const int registers = (tokens + Slice::tokens - 1) / Slice::tokens;
  float step[n];
  for (int q = 0; q < n; ++q) step[q] = weights.step[q] * side.plane_step;
  for (int slice = 0; slice < slices; ++slice) {
    const uint8_t* previous = codes + ((unit - 1) * slices + (slice ? slice - 1 : slices - 1)) * pitch;
    __m512i first[n], second[n];
    for (int q = 0; q < n; ++q) first[q] = second[q] = _mm512_setzero_si512();
    const auto look_up = [&](int r) {
      __m512i bytes[unit];
#pragma GCC unroll 3
      for (int i = 0; i < unit; ++i) {
        const int part = i * slices + slice;
        if (pair == 0) _mm_prefetch(ahead + (part * registers + r) * 64, _MM_HINT_T1);
        bytes[i] = _mm512_loadu_si512(codes + part * pitch + static_cast<size_t>(r) * 64);
      }
      const __m512i last = _mm512_loadu_si512(previous + static_cast<size_t>(r) * 64);
      tables.look_up(bytes, _mm512_alignr_epi32(bytes[unit - 1], last, 15));
    };
    look_up(0);
    for (int r = 0; r < registers; ++r) {
      const __m512i x = tables.x, y = tables.y;
      if (r + 1 < registers) look_up(r + 1);  // beside the products, not in front of them
      for (int q = 0; q < n; ++q) {
        const __m512i weight = Slice::weights(weights.low[q] + Slice::tokens * r);
        first[q] = plus_products(first[q], weight, x);
        second[q] = plus_products(second[q], weight, y);
      }
    }
    for (int q = 0; q < n; ++q) {
      float* row = out + q * width + 2 * pair * units + slice * Slice::units;
      Slice::add(row, first[q], step[q]);
      Slice::add(row + units, second[q], step[q]);
    }
  }
}

template <int n>
void mix_int8(const Side& side, const uint8_t* codes, size_t pitch, int quads, const Weights& weights, float* out,
              int width, const uint8_t* ahead) {
  for (int slice = 0; slice < side.code_bytes / kValueSlice; ++slice) {
    __m512i high[n], low[n];
    for (int q = 0; q < n; ++q) high[q] = low[q] = _mm512_setzero_si512();
    for (int quad = 0; quad < quads; ++quad) {
      const __m512i numbers = _mm512_loadu_si512(codes + slice * pitch + static_cast<size_t>(quad) * 64);
      _mm_prefetch(ahead + (slice * quads + quad) * 64, _MM_HINT_T1);
      for (int q = 0; q < n; ++q) {
        high[q] = plus_products(high[q], four_weights(weights.high[q] + 4 * quad), numbers);
        low[q] = plus_products(low[q], four_weights(weights.low[q] + 4 * quad), numbers);
      }
    }
    for (int q = 0; q < n; ++q) {
      float* row = out + q * width + slice * kValueSlice;
      add_scaled(row, high[q], 256.0f * weights.step[q]);
      add_scaled(row, low[q], weights.step[q]);
    }
  }
}

template <int n>
void mix_block(const Side& side, const uint8_t* codes, size_t pitch, int tokens, const float* weights,
               const float* norms, float* out, int width, const uint8_t* ahead) {
  Weights bytes;
  for (int q = 0; q < n; ++q) quantize_weights(weights + q * kTile, norms, side.form == Form::int8, q, bytes);
  if (side.form == Form::int8) return mix_int8<n>(side, codes, pitch, (tokens + 3) / 4, bytes, out, width, ahead);
  const auto mix = [&](auto tables, auto slice) {
    for (int pair = 0; pair < side.planes / 2; ++pair) {
      mix_pair<typename decltype(tables)::Tables, decltype(slice), n>(side, codes, pitch, tokens, pair, bytes, out,
                                                                      width, ahead);
    }
  };
  if (side.slice == Narrow::units) return mix(Kind<SixBitPair>{}, Narrow{});
  with_tables(side, [&](auto tables) { mix(tables, Wide{}); });
}

}  // namespace

bool integer_always(const Side&) { return true; }

size_t integer_prepared_bytes(const Side& key, int n) { return num_blocks(n) * block_bytes(key); }

void integer_prepare(const Side& key, const float* queries, int n, uint8_t* prepared) {
  each_block(n, [&](auto block) {
    for (int i = 0; i < block.size; ++i) {
      const float* row = queries + static_cast<size_t>(block.first + i) * padded_dim(key.dim);
      quantize_query(block_at(key, prepared, block.index), key, block.size, i, row);
    }
  });
}

void integer_score(const Side& key, const Span& span, int first, int tokens, const uint8_t* prepared, int n,
                   const float* norms, const float* shifts, float* logits, const uint8_t* ahead) {
  const uint8_t* codes = span.codes + static_cast<size_t>(first) * key.code_bytes;
  const int groups = (tokens + kTokenTile - 1) / kTokenTile;
  each_block(n, [&](auto block) {
    score_block<block.size>(key, codes, groups, block_at(key, prepared, block.index), norms,
                            shifts + block.first, logits + block.first * kTile, ahead);
  });
}

void integer_mix(const Side& value, const Span& span, int first, int tokens, const float* weights, int n,
                 const float* norms, float* out, const uint8_t* ahead) {
  const uint8_t* codes = span.codes + static_cast<size_t>(first) * value.slice;
  const size_t pitch = static_cast<size_t>(span.padded) * value.slice;
  const int width = padded_dim(value.dim);
  each_block(n, [&](auto block) {
    mix_block<block.size>(value, codes, pitch, tokens, weights + block.first * kTile, norms,
                          out + static_cast<size_t>(block.first) * width, width, ahead);
  });
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
