// What encoding does before and after the search for codes: rotated unit vectors, gains, norms.
#pragma once

#include "encode_bits.h"
#include "encode_book.h"
#include "encode_rotation.h"
#include "encode_rows.h"

namespace fibkv {
namespace FIBKV_ISA {

// Working memory of a batch. The rotated unit vectors are float32; what comes before them is float64 and lies where the
// later steps write.
struct FibScratch {
  vd* low;       // [d] and [d]: coordinates before the rotation, float64, half of the lanes each
  vd* high;
  vd* turned;    // [d]: the product with a matrix
  vf* unit;      // [d]
  vf* scaled;    // [d]: a factor times `unit`
  vi* index;     // [blocks]
  vi* best;      // [blocks]: those of the best factor
  vi* words;     // [words of a code, and one]

  static size_t registers(const FibForm& form) {
    return 5 * (size_t)form.dim + 2 * form.blocks() + num_words(form) + 1;
  }

  FibScratch(const FibForm& form, void* memory) {
    Room room(memory);
    room.take(form.dim, low);
    room.take(form.dim, high);
    room.take(form.dim, turned);
    room.take(form.dim, unit);
    room.take(form.dim, scaled);
    room.take(form.blocks(), index);
    room.take(form.blocks(), best);
    room.take(num_words(form) + 1, words);
  }
};

// 1 / v, and 0 for 0.
static inline vd reciprocal_or_zero(vd v) { return v == vd{} ? vd{} : splat_wide(1.0) / v; }

static inline bool all_finite(vd v) {
  for (int i = 0; i < kHalf; ++i) {
    if (!__builtin_isfinite(v[i])) return false;
  }
  return true;
}

static inline void rotate_wide(const FibForm& form, vd* x, vd* turned) {
  if (form.rounds) return rotate(form.signs, form.rounds, form.dim, x);
  multiply(form.matrix, form.dim, x, turned);
  for (int i = 0; i < form.dim; ++i) x[i] = turned[i];
}

// Rotated unit vectors and their lengths, everything that comes before their rounding in float64. False: a row was
// not finite. The squares of float32 numbers neither overflow nor vanish in float64.
template <Element element>
static bool rotate_exactly(const FibForm& form, const void* rows, int count, const FibScratch& scratch, Wide& length) {
  Wide energy;
  read_rows<element>(rows, count, form.dim, [&](int i, vf lanes) {
    if (form.rounds) lanes = turned(lanes, (int32_t)(form.signs[i] >> 32));
    const vd low = widen_low(lanes), high = widen_high(lanes);
    scratch.low[i] = low;
    scratch.high[i] = high;
    energy.low = multiply_add(low, low, energy.low);
    energy.high = multiply_add(high, high, energy.high);
  });
  if (!all_finite(energy.low) || !all_finite(energy.high)) return false;
  length = {square_root(energy.low), square_root(energy.high)};
  rotate_wide(form, scratch.low, scratch.turned);
  rotate_wide(form, scratch.high, scratch.turned);
  const vd low = splat_wide(form.forward_scale) * reciprocal_or_zero(length.low);
  const vd high = splat_wide(form.forward_scale) * reciprocal_or_zero(length.high);
  for (int i = 0; i < form.dim; ++i) scratch.unit[i] = narrow(scratch.low[i] * low, scratch.high[i] * high);
  return true;
}

// <u, q> and <q, q> of a unit vector and the codewords chosen for it.
struct Fit {
  Wide along, energy;
};

static Fit fit(const FibForm& form, const vf* unit, const vi* index) {
  Fit sums;
  each_coordinate(form, index, [&](int i, vf q) {
    const vd low = widen_low(q), high = widen_high(q);
    sums.along.low = multiply_add(widen_low(unit[i]), low, sums.along.low);
    sums.along.high = multiply_add(widen_high(unit[i]), high, sums.along.high);
    sums.energy.low = multiply_add(low, low, sums.energy.low);
    sums.energy.high = multiply_add(high, high, sums.energy.high);
  });
  return sums;
}

// max(<u, q> / <q, q>, 0), and 0 for q = 0.
static inline vd gain(vd along, vd energy) {
  const vd best = along * reciprocal_or_zero(energy);
  return best > vd{} ? best : vd{};
}

static inline Wide with_gain(const Wide& length, const Fit& sums) {
  return {length.low * gain(sums.along.low, sums.energy.low), length.high * gain(sums.along.high, sums.energy.high)};
}

static inline void write_norms(const Wide& length, int count, double* norms) {
  for (int lane = 0; lane < count; ++lane) norms[lane] = lane < kHalf ? length.low[lane] : length.high[lane - kHalf];
}

// cos(u, q) for unit u, and 0 for q = 0.
static inline vd cosine(vd along, vd energy) { return energy == vd{} ? vd{} : along / square_root(energy); }

// Which lanes of `better` are set, one per vector.
static inline vi lanes_above(const Wide& a, const Wide& b) {
  vi mask;
  for (int i = 0; i < kHalf; ++i) {
    mask[i] = a.low[i] > b.low[i] ? -1 : 0;
    mask[kHalf + i] = a.high[i] > b.high[i] ? -1 : 0;
  }
  return mask;
}

// Of all that a scale search found for the unit vectors, lane by lane the codes whose direction fits best, the first of
// equals, and their fit.
struct Best {
  Fit fit;
  Wide cosine;
  bool is_first = true;

  void offer(const FibForm& form, const FibScratch& scratch) {
    offer(FIBKV_ISA::fit(form, scratch.unit, scratch.index), form.blocks(), scratch.index, scratch.best);
  }

  // Takes indices [blocks] that fit so well to `taken` where they are better.
  void offer(const Fit& tried, int blocks, const vi* index, vi* taken) {
    const Wide found{FIBKV_ISA::cosine(tried.along.low, tried.energy.low),
                     FIBKV_ISA::cosine(tried.along.high, tried.energy.high)};
    if (is_first) {
      is_first = false;
      fit = tried;
      cosine = found;
      for (int b = 0; b < blocks; ++b) taken[b] = index[b];
      return;
    }
    const vi better = lanes_above(found, cosine);
    for (int b = 0; b < blocks; ++b) taken[b] = choose(better, index[b], taken[b]);
    for (int i = 0; i < kHalf; ++i) {
      if (better[i]) {
        cosine.low[i] = found.low[i];
        fit.along.low[i] = tried.along.low[i];
        fit.energy.low[i] = tried.energy.low[i];
      }
      if (better[kHalf + i]) {
        cosine.high[i] = found.high[i];
        fit.along.high[i] = tried.along.high[i];
        fit.energy.high[i] = tried.energy.high[i];
      }
    }
  }
};

// Norms and codes of `count` rows from what was found for them.
static void write_batch(const FibForm& form, const vi* index, Wide length, const Fit& sums, int count, uint8_t* codes,
                        double* norms, vi* words) {
  if (form.gain_corrected) length = with_gain(length, sums);
  write_norms(length, count, norms);
  pack_lanes(form, index, words);
  write_codes(form.code_bytes(), words, count, codes);
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
