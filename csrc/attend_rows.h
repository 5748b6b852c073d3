// Scoring and mixing on rows of a tile in float32: decoded ones, or codes that only have to be widened.
#pragma once

#include "attend_decode.h"
#include "number.h"

namespace fibkv {
namespace FIBKV_ISA {

// Rows of a tile as kernels read them, a vector at a time: decoded ones, or codes that widen as they are. What is read
// later is fetched beside that, a few lines at a time: more than a core can wait for hold it up.
struct Decoded {
  const float* rows;
  int width;
  vf at(int token, int i) const { return load<vf>(rows + static_cast<size_t>(token) * width + i); }
  void fetch(int, int, int) const {}  // decoding did
};

template <typename Narrow, vf (*widen)(Narrow)>
struct Widened {
  static constexpr size_t size = sizeof(Narrow) / kLanes;  // of an element
  const uint8_t *rows, *ahead;
  size_t pitch;  // bytes
  vf at(int token, int i) const { return widen(load<Narrow>(rows + token * pitch + i * size)); }
  // What elements [i, i + count) of a token are at `ahead`.
  void fetch(int token, int i, int count) const {
    const uint8_t* from = ahead + token * pitch + i * size;
    for (size_t at = 0; at < count * size; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// Dot products of n queries with `at_once` rows from row t on.
template <int n, int at_once, typename Rows>
static void dots(const Rows& rows, int width, int t, const float* queries, float* logits) {
  vf sums[kLanes > n * at_once ? kLanes : n * at_once] = {};
  for (int j = 0; j < at_once; ++j) rows.fetch(t + j, 0, width);
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
static void score_block(const Rows& rows, int width, int tokens, const float* queries, float* logits) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) dots<n, 4>(rows, width, t, queries, logits);
  for (; t < tokens; ++t) dots<n, 1>(rows, width, t, queries, logits);
}

template <typename Rows>
static void score_rows(const Rows& rows, int width, int tokens, const float* queries, int n, float* logits) {
  int q = 0;
  for (; q + 4 <= n; q += 4) score_block<4>(rows, width, tokens, queries + q * width, logits + q * kTile);
  for (; q < n; ++q) score_block<1>(rows, width, tokens, queries + q * width, logits + q * kTile);
}

template <int n, typename Rows>
static void mix_block(const Rows& rows, int width, int tokens, const float* weights, float* out) {
  constexpr int vectors = kLanes >= 16 ? 4 : 2;
  const auto strip = [&](int i, auto count) {
    constexpr int number = decltype(count)::number;
    vf sums[n][number];
    for (int q = 0; q < n; ++q) {
      for (int s = 0; s < number; ++s) sums[q][s] = load<vf>(out + q * width + i + s * kLanes);
    }
    for (int t = 0; t < tokens; ++t) {
      rows.fetch(t, i, number * kLanes);
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
static void mix_rows(const Rows& rows, int width, int tokens, const float* weights, int n, float* out) {
  int q = 0;
  for (; q + 4 <= n; q += 4) mix_block<4>(rows, width, tokens, weights + q * kTile, out + q * width);
  for (; q < n; ++q) mix_block<1>(rows, width, tokens, weights + q * kTile, out + q * width);
}

// As many bytes at `ahead` as the codes of a tile have.
static void prefetch_codes(const Side& side, int first, int tokens, const uint8_t* ahead) {
  const size_t pitch = side.code_bytes;
  for (size_t at = first * pitch; at < (first + tokens) * pitch; at += 64) __builtin_prefetch(ahead + at, 0, 2);
}

// Calls visit(rows) with the codes themselves where few queries meet numbers that only have to be widened; whether it
// did. What is `ahead` is fetched meanwhile.
template <typename Visit>
static bool in_place(const Side& side, const Span& span, int first, int n, const uint8_t* ahead, Visit visit) {
  if (side.order != Order::rows || side.channels || side.dim % kPad || n > kFewQueries) return false;
  const size_t pitch = side.code_bytes;
  const uint8_t* rows = span.codes + first * pitch;
  ahead += first * pitch;
  switch (side.form) {
    case Form::f32:
      visit(Widened<vf, same>{rows, ahead, pitch});
      return true;
    case Form::f16:
      visit(Widened<vh, from_f16>{rows, ahead, pitch});
      return true;
    case Form::bf16:
      visit(Widened<vh, from_bf16>{rows, ahead, pitch});
      return true;
    case Form::int8:
      visit(Widened<vsb, from_int8>{rows, ahead, pitch});
      return true;
    case Form::fp8:
      visit(Widened<vb, from_e4m3>{rows, ahead, pitch});
      return true;
    default:
      return false;
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
