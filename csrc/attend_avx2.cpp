// Scoring and mixing on the codes with AVX2: two coordinates of a codeword are one gathered 32-bit word of two int16,
// which meets two int16 of the query or of the weights in one instruction.
#include <immintrin.h>

#include <cstring>

#include "integer_blocks.h"
#include "integer_kernels.h"

namespace fibkv {
namespace FIBKV_ISA {
namespace {

constexpr int kLanes = 8;
// Queries and weights are int16 of at most this magnitude: see kMostWord.
constexpr float kMostNumber = 8191.0f;

// Queries of a block: float step[8]; int32 pairs[units * planes / 2][queries of the block], two int16 each, in the
// order in which `score` meets them.
struct Prepared {
  float* step;
  int32_t* pairs;
};

int pairs_of(const Side& side) { return side.dim / 2; }

size_t block_bytes(const Side& side) { return kMostQueries * (sizeof(float) + sizeof(int32_t) * pairs_of(side)); }

Prepared block_at(const Side& side, const uint8_t* prepared, int index) {
  uint8_t* at = const_cast<uint8_t*>(prepared) + index * block_bytes(side);
  return {reinterpret_cast<float*>(at), reinterpret_cast<int32_t*>(at + 4 * kMostQueries)};
}

int32_t two(int low, int high) { return static_cast<int32_t>((low & 0xFFFF) | static_cast<uint32_t>(high) << 16); }

int rounded(float x) { return static_cast<int>(__builtin_rintf(x)); }

void quantize_query(const Prepared& block, const Side& side, int n, int q, const float* row) {
  float top = 0;
  for (int i = 0; i < side.dim; ++i) top = __builtin_fabsf(row[i]) > top ? __builtin_fabsf(row[i]) : top;
  const float inverse = top > 0 ? kMostNumber / top : 0;
  const bool table = side.form == Form::fib;
  block.step[q] = top / kMostNumber * (table ? side.word_step : 1.0f);
  const auto put = [&](int i, int first, int second) {
    block.pairs[i * n + q] = two(rounded(row[first] * inverse), rounded(row[second] * inverse));
  };
  if (!table) {
    // Of four dimensions 0 and 2, then 1 and 3.
    for (int i = 0; i < pairs_of(side); ++i) put(i, i / 2 * 4 + i % 2, i / 2 * 4 + i % 2 + 2);
    return;
  }
  // [pair][unit], coordinates of one unit.
  const int units = side.units();
  for (int pair = 0; pair < side.planes / 2; ++pair) {
    for (int unit = 0; unit < units; ++unit) {
      const int first = unit * side.planes + 2 * pair;
      put(pair * units + unit, first, first + 1);
    }
  }
}

inline __m256i add_products(__m256i sums, __m256i numbers, int32_t pair) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(numbers, _mm256_set1_epi32(pair)));
}

// Byte `i` of each lane.
template <int i>
inline __m256i byte_of(__m256i codes) {
  return _mm256_and_si256(_mm256_srli_epi32(codes, 8 * i), _mm256_set1_epi32(255));
}

inline __m256i load_codes(const uint8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

// Units of one byte: a table of 256 words for each pair of planes.
struct Bytes {
  static constexpr int unit = 1;
  const int32_t* words;

  Bytes(const Side& side, int pair) : words(side.words + 256 * pair) {}

  // The words of unit `i` of each lane.
  template <int i>
  __m256i look_up(const __m256i (&codes)[1]) const {
    return _mm256_i32gather_epi32(words, byte_of<i>(codes[0]), 4);
  }
};

// Units of three bytes: six bits for each pair of planes, and one table of 64 words.
struct SixBits {
  static constexpr int unit = 3;
  const int32_t* words;
  __m128i shift;

  SixBits(const Side& side, int pair) : words(side.words), shift(_mm_cvtsi32_si128(6 * pair)) {}

  template <int i>
  __m256i look_up(const __m256i (&codes)[3]) const {
    const __m256i second = _mm256_slli_epi32(byte_of<i>(codes[1]), 8);
    const __m256i third = _mm256_slli_epi32(byte_of<i>(codes[2]), 16);
    const __m256i whole = _mm256_or_si256(byte_of<i>(codes[0]), _mm256_or_si256(second, third));
    return _mm256_i32gather_epi32(words, _mm256_and_si256(_mm256_srl_epi32(whole, shift), _mm256_set1_epi32(63)), 4);
  }
};

template <typename T>
struct Kind {
  using Words = T;
};

// Calls visit(Kind<Words>) with what looks up the planes of a side.
template <typename Visit>
inline void with_words(const Side& side, Visit visit) {
  if (side.unit == 3) return visit(Kind<SixBits>{});
  visit(Kind<Bytes>{});
}

inline __m256i even_bytes(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
inline __m256i odd_bytes(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// ---- Keys ----------------------------------------------------------------------------------------------------------

template <int n>
inline void meet(__m256i (&sums)[n], __m256i numbers, const int32_t* queries) {
  for (int q = 0; q < n; ++q) sums[q] = add_products(sums[q], numbers, queries[q]);
}

// Sums of eight tokens: `codes` points at their lanes in the first chunk of their group.
template <int n>
void score_eight_int8(const Side& side, const uint8_t* codes, const int32_t* queries, __m256i (&sums)[n]) {
  for (int j = 0; j < side.code_bytes / 4; ++j) {
    const __m256i bytes = load_codes(codes + j * 64);
    meet<n>(sums, even_bytes(bytes), queries + 2 * j * n);
    meet<n>(sums, odd_bytes(bytes), queries + (2 * j + 1) * n);
  }
}

template <typename Words, int n>
void score_eight(const Side& side, const uint8_t* codes, const int32_t* queries, __m256i (&sums)[n]) {
  const int steps = side.units() / 4;
  for (int j = 0; j < steps; ++j) {
    __m256i bytes[Words::unit];
    for (int i = 0; i < Words::unit; ++i) bytes[i] = load_codes(codes + (i * steps + j) * 64);
    for (int pair = 0; pair < side.planes / 2; ++pair) {
      const Words words(side, pair);
      const int32_t* four = queries + (static_cast<size_t>(pair) * side.units() + 4 * j) * n;
      meet<n>(sums, words.template look_up<0>(bytes), four);
      meet<n>(sums, words.template look_up<1>(bytes), four + n);
      meet<n>(sums, words.template look_up<2>(bytes), four + 2 * n);
      meet<n>(sums, words.template look_up<3>(bytes), four + 3 * n);
    }
  }
}

template <int n>
void score_block(const Side& side, const uint8_t* codes, int tokens, const Prepared& block, const float* norms,
                 const float* shifts, float* logits) {
  for (int t = 0; t < tokens; t += kLanes) {
    const size_t at = static_cast<size_t>(t / kTokenTile) * side.code_bytes * kTokenTile + t % kTokenTile * 4;
    __m256i sums[n] = {};
    if (side.form == Form::int8) {
      score_eight_int8<n>(side, codes + at, block.pairs, sums);
    } else {
      with_words(side, [&](auto kind) {
        score_eight<typename decltype(kind)::Words, n>(side, codes + at, block.pairs, sums);
      });
    }
    const __m256 norm = _mm256_loadu_ps(norms + t);
    for (int q = 0; q < n; ++q) {
      const __m256 factor = _mm256_mul_ps(norm, _mm256_set1_ps(block.step[q]));
      const __m256 shift = _mm256_set1_ps(shifts[q]);
      _mm256_storeu_ps(logits + q * kTile + t, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[q]), factor, shift));
    }
  }
}

// ---- Values --------------------------------------------------------------------------------------------------------

// Weights of a tile as pairs of int16: of each four tokens, `first` and `second` pair.
struct Weights {
  int32_t pairs[kMostQueries][kTile / 2];
  float step[kMostQueries];
};

void quantize_weights(const Side& side, const float* weights, const float* norms, int q, Weights& numbers) {
  float products[kTile], top = 0;
  for (int t = 0; t < kTile; ++t) {
    products[t] = weights[t] * norms[t];
    top = products[t] > top ? products[t] : top;
  }
  const bool table = side.form == Form::fib;
  const float inverse = top > 0 ? kMostNumber / top : 0;
  numbers.step[q] = top / kMostNumber * (table ? side.word_step : 1.0f);
  for (int t = 0; t < kTile; t += 4) {
    int whole[4];
    for (int i = 0; i < 4; ++i) whole[i] = rounded(products[t + i] * inverse);
    // Tables are looked up token by token and pair neighbours; bytes widen to even and odd tokens.
    numbers.pairs[q][t / 2] = table ? two(whole[0], whole[1]) : two(whole[0], whole[2]);
    numbers.pairs[q][t / 2 + 1] = table ? two(whole[2], whole[3]) : two(whole[1], whole[3]);
  }
}

inline void add_scaled(float* out, __m256i sums, float step) {
  _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(step), _mm256_loadu_ps(out)));
}

// Of two tokens' words, the pair of their low and the pair of their high halves.
inline __m256i low_halves(__m256i a, __m256i b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA); }
inline __m256i high_halves(__m256i a, __m256i b) { return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA); }

// Two planes of eight units; `codes` points at the lanes of their first bytes in the first quad of their slice, the
// next bytes are `apart` from them.
template <typename Words, int n>
void mix_eight(const Side& side, const uint8_t* codes, size_t apart, int quads, int pair, const Weights& weights,
               float* out, int width) {
  const Words words(side, pair);
  __m256i even[n] = {}, odd[n] = {};
  for (int quad = 0; quad < quads; ++quad) {
    __m256i bytes[Words::unit];
    for (int i = 0; i < Words::unit; ++i) bytes[i] = load_codes(codes + i * apart + quad * 4 * side.slice);
    const __m256i a = words.template look_up<0>(bytes), b = words.template look_up<1>(bytes);
    const __m256i c = words.template look_up<2>(bytes), d = words.template look_up<3>(bytes);
    const __m256i low = low_halves(a, b), high = high_halves(a, b);
    const __m256i later_low = low_halves(c, d), later_high = high_halves(c, d);
    for (int q = 0; q < n; ++q) {
      const int32_t first = weights.pairs[q][2 * quad], second = weights.pairs[q][2 * quad + 1];
      even[q] = add_products(add_products(even[q], low, first), later_low, second);
      odd[q] = add_products(add_products(odd[q], high, first), later_high, second);
    }
  }
  for (int q = 0; q < n; ++q) {
    float* row = out + static_cast<size_t>(q) * width + static_cast<size_t>(2 * pair) * side.units();
    add_scaled(row, even[q], weights.step[q]);
    add_scaled(row + side.units(), odd[q], weights.step[q]);
  }
}

template <int n>
void mix_eight_int8(const uint8_t* codes, int quads, const Weights& weights, float* out, int width) {
  __m256i sums[n] = {};
  for (int quad = 0; quad < quads; ++quad) {
    const __m256i bytes = load_codes(codes + quad * 64);
    const __m256i even = even_bytes(bytes), odd = odd_bytes(bytes);
    for (int q = 0; q < n; ++q) {
      sums[q] = add_products(add_products(sums[q], even, weights.pairs[q][2 * quad]), odd, weights.pairs[q][2 * quad + 1]);
    }
  }
  for (int q = 0; q < n; ++q) add_scaled(out + static_cast<size_t>(q) * width, sums[q], weights.step[q]);
}

template <int n>
void mix_block(const Side& side, const uint8_t* codes, size_t pitch, int quads, const float* weights,
               const float* norms, float* out, int width) {
  Weights numbers;
  for (int q = 0; q < n; ++q) quantize_weights(side, weights + q * kTile, norms, q, numbers);
  for (int unit = 0; unit < side.units(); unit += kLanes) {
    const uint8_t* lanes = codes + unit / side.slice * pitch + unit % side.slice * 4;
    if (side.form == Form::int8) {
      mix_eight_int8<n>(lanes, quads, numbers, out + unit, width);
      continue;
    }
    with_words(side, [&](auto kind) {
      const size_t apart = side.units() / side.slice * pitch;
      for (int pair = 0; pair < side.planes / 2; ++pair) {
        mix_eight<typename decltype(kind)::Words, n>(side, lanes, apart, quads, pair, numbers, out + unit, width);
      }
    });
  }
}

}  // namespace

bool integer_always(const Side& side) { return side.form == Form::int8; }

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
                   const float* norms, const float* shifts, float* logits, const uint8_t*) {
  const uint8_t* codes = span.codes + static_cast<size_t>(first) * key.code_bytes;
  each_block(n, [&](auto block) {
    score_block<block.size>(key, codes, tokens, block_at(key, prepared, block.index), norms,
                            shifts + block.first, logits + block.first * kTile);
  });
}

void integer_mix(const Side& value, const Span& span, int first, int tokens, const float* weights, int n,
                 const float* norms, float* out, const uint8_t*) {
  const uint8_t* codes = span.codes + static_cast<size_t>(first) * value.slice;
  const size_t pitch = static_cast<size_t>(span.padded) * value.slice;
  const int quads = (tokens + 3) / 4, width = padded_dim(value.dim);
  each_block(n, [&](auto block) {
    mix_block<block.size>(value, codes, pitch, quads, weights + block.first * kTile, norms,
                          out + static_cast<size_t>(block.first) * width, width);
  });
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
