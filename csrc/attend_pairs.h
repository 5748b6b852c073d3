// klt codes in attention: pairs of coordinates whose indices have widths of their own.
#pragma once

#include "encode_bits.h"
#include "side.h"

namespace fibkv {
namespace FIBKV_ISA {

// Codewords of pairs whose indices have `bits` bits each, from a bit of the code on. Reads up to 7 bytes behind them.
template <int bits>
static void copy_pairs(const uint8_t* code, int bit, int pairs, const float* book, float* row) {
  constexpr int most = (64 - 7) / bits;  // in eight bytes, wherever the first one begins
  for (int pair = 0; pair < pairs; pair += most, bit += most * bits) {
    uint64_t indices;
    std::memcpy(&indices, code + (bit >> 3), sizeof indices);
    indices >>= bit & 7;
    const int some = pairs - pair < most ? pairs - pair : most;
    for (int i = 0; i < some; ++i, indices >>= bits) {
      std::memcpy(row + 2 * (pair + i), book + 2 * (indices & ((1 << bits) - 1)), 2 * sizeof(float));
    }
  }
}

// The codewords of the pairs of one vector.
static void decode_pairs(const PairSection* sections, const uint8_t* code, int code_bytes, float* row) {
  uint8_t room[4096 / 2 + 8];
  std::memcpy(room, code, code_bytes);
  for (int i = 0; i < kPairLevels; ++i) {
    const PairSection& section = sections[i];
    switch (section.bits) {
      case 8:
        copy_pairs<8>(room, section.first_bit, section.pairs, section.book, row);
        break;
      case 6:
        copy_pairs<6>(room, section.first_bit, section.pairs, section.book, row);
        break;
      case 4:
        copy_pairs<4>(room, section.first_bit, section.pairs, section.book, row);
        break;
      case 2:
        copy_pairs<2>(room, section.first_bit, section.pairs, section.book, row);
        break;
      default:
        std::memset(row, 0, 2 * section.pairs * sizeof(float));
    }
    row += 2 * section.pairs;
  }
}

// The codewords of one width, looked up for kLanes tokens at once: from memory, or up to 64 of them from registers.
template <int bits>
struct PairBook {
  explicit PairBook(const float* book) : memory(book) {}
  void look_up(vi index, vf& x, vf& y) const { gather_pairs(memory, index, x, y); }
  const float* memory;
};

#if defined(__AVX512F__)
// Both coordinates of sixteen pairs.
struct SixteenPairs {
  explicit SixteenPairs(const float* pairs) {
    const __m512 low = _mm512_loadu_ps(pairs), high = _mm512_loadu_ps(pairs + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    x = _mm512_permutex2var_ps(low, even, high);
    y = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
  }
  __m512 x, y;
};

template <>
struct PairBook<4> {
  explicit PairBook(const float* book) : pairs(book) {}
  void look_up(vi index, vf& x, vf& y) const {
    x = (vf)_mm512_permutexvar_ps((__m512i)index, pairs.x);
    y = (vf)_mm512_permutexvar_ps((__m512i)index, pairs.y);
  }
  SixteenPairs pairs;
};

template <>
struct PairBook<2> : PairBook<4> {
  // The four codewords are followed by the sixteen of the next width.
  using PairBook<4>::PairBook;
};

template <>
struct PairBook<6> {
  explicit PairBook(const float* book) : pairs{SixteenPairs(book), SixteenPairs(book + 32), SixteenPairs(book + 64),
                                               SixteenPairs(book + 96)} {}
  void look_up(vi index, vf& x, vf& y) const {
    const __m512i i = (__m512i)index;
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    x = (vf)_mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(pairs[0].x, i, pairs[1].x),
                                 _mm512_permutex2var_ps(pairs[2].x, i, pairs[3].x));
    y = (vf)_mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(pairs[0].y, i, pairs[1].y),
                                 _mm512_permutex2var_ps(pairs[2].y, i, pairs[3].y));
  }
  SixteenPairs pairs[4];
};
#endif

// Adds the products of n queries, from the section's first coordinate on, with the pairs of a section of kLanes keys.
template <int n, int bits>
static void add_pairs(const PairSection& section, const vi* words, const float* queries, int width, vf* sums) {
  const PairBook<bits> book(section.book);
  int bit = section.first_bit;
  for (int pair = 0; pair < section.pairs; ++pair, bit += bits) {
    const int word = bit / 32, offset = bit % 32;
    vu value = (vu)words[word] >> offset;
    if (offset + bits > 32) value |= (vu)words[word + 1] << (32 - offset);
    vf x, y;
    book.look_up((vi)value & splat((1 << bits) - 1), x, y);
    for (int q = 0; q < n; ++q) {
      const float* query = queries + static_cast<size_t>(q) * width + 2 * pair;
      sums[q] = multiply_add(splat(query[0]), x, multiply_add(splat(query[1]), y, sums[q]));
    }
  }
}

template <int n>
static void score_lanes(const PairSection* sections, const vi* words, const float* queries, int width, int pitch,
                        float* logits) {
  vf sums[n] = {};
  for (int i = 0; i < kPairLevels; ++i) {
    const PairSection& section = sections[i];
    switch (section.bits) {
      case 8:
        add_pairs<n, 8>(section, words, queries, width, sums);
        break;
      case 6:
        add_pairs<n, 6>(section, words, queries, width, sums);
        break;
      case 4:
        add_pairs<n, 4>(section, words, queries, width, sums);
        break;
      case 2:
        add_pairs<n, 2>(section, words, queries, width, sums);
        break;
    }
    queries += 2 * section.pairs;
  }
  for (int q = 0; q < n; ++q) store(logits + static_cast<size_t>(q) * pitch, sums[q]);
}

// logits[q * pitch + t] = <query q, codewords of token first + t>, t < tokens, of queries [n][width]; in registers
// tokens stand side by side, so that no key is ever written out. Writes whole registers of logits.
static void score_pairs(const Side& key, const Span& span, int first, int tokens, const float* queries, int n, int width,
                        int pitch, float* logits) {
  vi words[4096 / 2 / 4 + 2];
  for (int t = 0; t < tokens; t += kLanes) {
    const int some = tokens - t < kLanes ? tokens - t : kLanes;
    read_codes(key.code_bytes, span.codes + static_cast<size_t>(first + t) * key.code_bytes, some, words);
    int q = 0;
    for (; q + 4 <= n; q += 4) {
      score_lanes<4>(span.sections, words, queries + q * width, width, pitch, logits + q * pitch + t);
    }
    for (; q < n; ++q) score_lanes<1>(span.sections, words, queries + q * width, width, pitch, logits + q * pitch + t);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
