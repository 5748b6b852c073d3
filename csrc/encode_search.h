// The nearest codeword of each block, for kLanes vectors at once.
//
// Exact means: the index that minimizes the squared distance summed in float32 coordinate by coordinate, the lower
// one of equals. Where that is decided no multiplication and addition may share a rounding: this file is compiled
// with -ffp-contract=off, and fused operations are written out where they may stand.
#pragma once

#include "encode.h"
#include "encode_book.h"

namespace fibkv {
namespace FIBKV_ISA {

// k = 1: the number of decision boundaries that are not above x.
static inline vi count_boundaries(const FibForm& form, vf x) {
  vi index{};
  if (form.size <= 16) {
    for (int j = 0; j + 1 < form.size; ++j) index -= x >= splat(form.boundaries[j]);
    return index;
  }
  for (int half = 1 << (form.steps - 1); half > 0; half /= 2) {
    const vi reached = index + splat(half);
    const vf boundary = as_float(gather(form.boundaries, reached - splat(1)));
    index = choose(x >= boundary, reached, index);
  }
  return index;
}

// The index of the nearest codeword to the block of one lane, whatever the book: lanes are codewords.
static int nearest_of_all(const FibForm& form, const vf* block, int lane) {
  vf least = splat(__builtin_inff());
  vi first{}, index = splat(0);
  for (int i = 0; i < kLanes; ++i) first[i] = i;
  for (int start = 0; start < form.padded; start += kLanes) {
    vf distance{};
    for (int axis = 0; axis < form.block; ++axis) {
      const vf difference = splat(block[axis][lane]) - load<vf>(form.planes + (int64_t)axis * form.padded + start);
      distance += difference * difference;
    }
    const vi nearer = distance < least;
    least = choose(nearer, distance, least);
    index = choose(nearer, first + splat(start), index);
  }
  int winner = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (least[i] < least[winner] || (least[i] == least[winner] && index[i] < index[winner])) winner = i;
  }
  return index[winner];
}

[[gnu::noinline]] static void search_again(const FibForm& form, const vf* block, vi lanes, vi& index) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane]) index[lane] = nearest_of_all(form, block, lane);
  }
}

static inline vi cell_of(const Square& square, vf x, vf y) {
  const vf extent = splat(square.extent), scale = splat(square.cells_per_unit);
  const vi row = clamp(truncated((x + extent) * scale), 0, square.side - 1);
  const vi column = clamp(truncated((y + extent) * scale), 0, square.side - 1);
  return row * splat(square.side) + column;
}

static inline vi decide(const FibForm& form, vf x, vf y) {
  return gather_bytes(form.decisions, cell_of(form.square, x, y)) & splat(0xFF);
}

// The squared distance of points to codewords.
static inline vf distance_of(vf x, vf y, vf to_x, vf to_y) {
  const vf dx = x - to_x, dy = y - to_y;
  return dx * dx + dy * dy;
}

// The nearest of four candidates, which rise, so that strictly nearer keeps the lower of equals. A repeated one changes
// nothing.
#if defined(__AVX512F__)
static inline vi nearest_of_four(const FibForm& form, vf x, vf y, vi list) {
  vf to_x[4], to_y[4];
  look_up_pairs(form, list, to_x, to_y);
  vi index = byte_of(list, 0);
  vf least = distance_of(x, y, to_x[0], to_y[0]);
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    const vf other = distance_of(x, y, to_x[i], to_y[i]);
    index = choose(other < least, byte_of(list, i), index);
    least = minimum(least, other);
  }
  return index;
}
#else
// Codewords are gathered one by one here: the last two are looked at where a lane has them.
static inline vi nearest_of_four(const FibForm& form, vf x, vf y, vi list) {
  const auto distance = [&](vi candidate) {
    vf to_x, to_y;
    gather_pairs(form.codewords, candidate, to_x, to_y);
    return distance_of(x, y, to_x, to_y);
  };
  vi index = byte_of(list, 0);
  vf least = distance(index);
  for (int i = 1; i < 4; ++i) {
    const vi candidate = byte_of(list, i);
    if (i > 1 && !any(candidate != byte_of(list, i - 1))) break;
    const vf other = distance(candidate);
    index = choose(other < least, candidate, index);
    least = minimum(least, other);
  }
  return index;
}
#endif

// k = 2: the nearest of the candidates of the point's cell, or of the book where its list is longer.
static inline vi nearest_on_grid(const FibForm& form, const vf* block, const vi* cell) {
  const vi list = gather_each(form.candidates, cell);
  vi index = nearest_of_four(form, block[0], block[1], list);
  if (form.long_lists) {
    const vi is_long = byte_of(list, 0) > byte_of(list, 1);
    if (any(is_long)) search_again(form, block, is_long, index);
  }
  return index;
}

// Any book: |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - <x, c>), the part in brackets by multiply-adds. Where the two lowest
// are too close for their rounding, and for that of the exact distances, the exact search decides.
//
// `k` and `blocks` are known to the compiler; k = 0 means form.block.
template <int k, int blocks>
static void filter(const FibForm& form, const vf* x, vi* index) {
  const int axes = k ? k : form.block;
  vf least[blocks], next[blocks];
  for (int b = 0; b < blocks; ++b) {
    least[b] = next[b] = splat(__builtin_inff());
    index[b] = splat(0);
  }
  const float* word = form.scores;
  for (int j = 0; j < form.size; ++j, word += 1 + axes) {
    const vi candidate = splat(j);
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) {
      vf score = splat(word[0]);
#pragma GCC unroll 8
      for (int axis = 0; axis < axes; ++axis) score = multiply_add(x[b * axes + axis], splat(word[1 + axis]), score);
      index[b] = choose(score < least[b], candidate, index[b]);
      next[b] = minimum(next[b], maximum(least[b], score));
      least[b] = minimum(least[b], score);
    }
  }
  for (int b = 0; b < blocks; ++b) {
    // Roundings: 2 k + 1 in a score, of numbers below (|x| + max |c|)^2, and k + 3 in a distance, which is below
    // that too; two of each. |x| <= max |x_i| sqrt(k) is bounded by the sum.
    vf length{};
    for (int axis = 0; axis < axes; ++axis) {
      const vf value = x[b * axes + axis];
      length += maximum(value, -value);
    }
    const vf reach = length + splat(form.largest);
    const vf margin = reach * reach * splat(6 * (axes + 2) * 0x1p-24f);
    const vi close = ~(next[b] - least[b] > margin);
    if (any(close)) search_again(form, x + b * axes, close, index[b]);
  }
}

template <int k>
static void filter_all(const FibForm& form, const vf* x, vi* index) {
  const int blocks = form.blocks();
  int b = 0;
  for (; b + 2 <= blocks; b += 2) filter<k, 2>(form, x + b * form.block, index + b);
  if (b < blocks) filter<k, 1>(form, x + b * form.block, index + b);
}

// Indices [blocks] of the codewords nearest to x [d].
static void search(const FibForm& form, const vf* x, vi* index) {
  const int blocks = form.blocks();
  switch (form.search) {
    case Search::scalar:
      for (int b = 0; b < blocks; ++b) index[b] = count_boundaries(form, x[b]);
      break;
    case Search::grid:
      for (int b = 0; b < blocks; ++b) index[b] = cell_of(form.square, x[2 * b], x[2 * b + 1]);
      for (int b = 0; b < blocks; ++b) index[b] = nearest_on_grid(form, x + 2 * b, index + b);
      break;
    case Search::table:
      for (int b = 0; b < blocks; ++b) index[b] = decide(form, x[2 * b], x[2 * b + 1]);
      break;
    case Search::filter:
      switch (form.block) {
        case 2: filter_all<2>(form, x, index); break;
        case 4: filter_all<4>(form, x, index); break;
        case 8: filter_all<8>(form, x, index); break;
        default: filter_all<0>(form, x, index);
      }
      break;
    case Search::path:
      __builtin_unreachable();  // not block by block: see find_codes
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
