// Many queries meet a decoded tile: products of matrices, on words of 32 bits that hold one float32 number or two
// bfloat16 ones. A class `Words` says how:
//
//   numbers                      of a word
//   part(from, count)            a register of numbers that lie one after another, `count` of them if these are fewer
//   across(from, pitch, rows)    words of the numbers in one place of `numbers` rows, or of those that there are
//   plus_products(sums, a, b)    sums + products of the numbers of a and b, summed word by word
#pragma once

#include <cstring>

#include "many_kernels.h"
#include "number.h"
#include "transpose.h"

namespace fibkv {
namespace FIBKV_ISA {

// The sums of so many rows, and of strips of so many vectors, stay in registers beside what is multiplied.
constexpr int kRows = kLanes >= 8 ? 6 : 4;
constexpr int kStrip = kLanes >= 16 ? 4 : 2;

// out [rows][out_pitch] = (or, with `add`, +=) words [rows][pitch], `steps` of each, times panel [steps][width], of
// which a strip of vectors is taken.
template <class Words, int rows, int strip, bool add>
static void multiply_strip(const int32_t* words, int pitch, const int32_t* panel, int width, int steps, float* out,
                           int out_pitch) {
  vf sums[rows][strip];
  for (int q = 0; q < rows; ++q) {
    for (int s = 0; s < strip; ++s) sums[q][s] = add ? load<vf>(out + q * out_pitch + s * kLanes) : vf{};
  }
  for (int step = 0; step < steps; ++step, panel += width) {
    vi row[strip];
    for (int s = 0; s < strip; ++s) row[s] = load<vi>(panel + s * kLanes);
    for (int q = 0; q < rows; ++q) {
      const vi word = splat(words[q * pitch + step]);
      for (int s = 0; s < strip; ++s) sums[q][s] = Words::plus_products(sums[q][s], row[s], word);
    }
  }
  for (int q = 0; q < rows; ++q) {
    for (int s = 0; s < strip; ++s) store(out + q * out_pitch + s * kLanes, sums[q][s]);
  }
}

template <class Words, bool add>
static void multiply(const int32_t* words, int pitch, int n, const int32_t* panel, int width, int steps, float* out,
                     int out_pitch) {
  const auto columns = [&](int i, auto strip) {
    const auto block = [&](int q, auto rows) {
      multiply_strip<Words, decltype(rows)::number, decltype(strip)::number, add>(
          words + q * pitch, pitch, panel + i, width, steps, out + q * out_pitch + i, out_pitch);
    };
    int q = 0;
    for (; q + kRows <= n; q += kRows) block(q, Number<kRows>{});
    for (; q + 2 <= n; q += 2) block(q, Number<2>{});
    if (q < n) block(q, Number<1>{});
  };
  int i = 0;
  for (; i + kStrip * kLanes <= width; i += kStrip * kLanes) columns(i, Number<kStrip>{});
  for (; i < width; i += kLanes) columns(i, Number<1>{});
}

// Rows [n][width] as words, one after another.
template <class Words>
static void to_words(const float* rows, int n, int width, int32_t* words) {
  constexpr int step = kLanes * Words::numbers;
  const int count = n * width;
  for (int i = 0; i < count; i += step) store(words + i / Words::numbers, Words::part(rows + i, count - i));
}

// Rows [tokens][width] as a panel [words of width][kTile]; columns behind the last token are zero.
template <class Words>
static void to_key_panel(const float* rows, int tokens, int width, int32_t* panel) {
  constexpr int step = kLanes * Words::numbers;
  for (int t = 0; t < kTile; t += kLanes) {
    for (int i = 0; i < width; i += step) {
      vi block[kLanes] = {};
      for (int j = 0; j < kLanes && t + j < tokens; ++j) {
        block[j] = Words::part(rows + static_cast<size_t>(t + j) * width + i, width - i);
      }
      transpose(block);
      const int count = (width - i < step ? width - i : step) / Words::numbers;
      for (int j = 0; j < count; ++j) store(panel + (i / Words::numbers + j) * kTile + t, block[j]);
    }
  }
}

// Rows [tokens][width] as a panel [words of tokens][width].
template <class Words>
static void to_value_panel(const float* rows, int tokens, int width, int32_t* panel) {
  for (int t = 0; t < tokens; t += Words::numbers) {
    for (int i = 0; i < width; i += kLanes, panel += kLanes) {
      store(panel, Words::across(rows + static_cast<size_t>(t) * width + i, width, tokens - t));
    }
  }
}

// In whole registers.
template <class Words>
static size_t many_prepared_bytes(int width, int n) {
  constexpr int step = kLanes * Words::numbers;
  return (static_cast<size_t>(n) * width + step - 1) / step * sizeof(vi);
}

template <class Words>
static void many_prepare(const float* queries, int n, int width, uint8_t* prepared) {
  to_words<Words>(queries, n, width, reinterpret_cast<int32_t*>(prepared));
}

// A panel, and weights as words.
template <class Words>
static size_t many_room_floats(int width, int n) {
  return static_cast<size_t>(kTile) * (width + n) / Words::numbers;
}

template <class Words>
static void many_score(const float* rows, int tokens, int width, const uint8_t* prepared, int n, float* logits,
                       float* room) {
  auto* panel = reinterpret_cast<int32_t*>(room);
  to_key_panel<Words>(rows, tokens, width, panel);
  const int steps = width / Words::numbers;
  multiply<Words, false>(reinterpret_cast<const int32_t*>(prepared), steps, n, panel, kTile, steps, logits, kTile);
}

template <class Words>
static void many_mix(const float* rows, int tokens, int width, const float* weights, int n, float* out, float* room) {
  auto* panel = reinterpret_cast<int32_t*>(room);
  int32_t* words = panel + kTile * width / Words::numbers;
  to_value_panel<Words>(rows, tokens, width, panel);
  to_words<Words>(weights, n, kTile, words);
  const int steps = (tokens + Words::numbers - 1) / Words::numbers;
  multiply<Words, true>(words, kTile / Words::numbers, n, panel, width, steps, out, width);
}

template <class Words>
constexpr ManyKernels many_kernels = {many_prepared_bytes<Words>, many_prepare<Words>, many_room_floats<Words>,
                                      many_score<Words>, many_mix<Words>};

}  // namespace FIBKV_ISA
}  // namespace fibkv
