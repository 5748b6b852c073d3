// FibQuant: kLanes vectors from memory to codes, and back.
#pragma once

#include "encode_bits.h"
#include "encode_rotation.h"
#include "encode_rows.h"
#include "encode_search.h"

namespace fibkv {
namespace FIBKV_ISA {

// Float64 of each lane.
struct Wide {
  vd low{}, high{};
};

// Working memory of a batch. The rotated unit vectors are float32; what comes before them is float64, or float32 in
// the table's search, and lies where the later steps write.
struct FibScratch {
  vd* low;       // [d] and [d]: coordinates before the rotation, float64, half of the lanes each
  vd* high;
  vd* turned;    // [d]: the product with a matrix
  vf* unit;      // [d]
  vf* scaled;    // [d]: a factor times `unit`
  vi* index;     // [blocks]
  vi* best;      // [blocks]: those of the best factor
  vi* words;     // [words of a code, and one]

  static size_t nbytes(const FibForm& form) {
    return sizeof(vf) * (5 * (size_t)form.dim + 2 * form.blocks() + num_words(form) + 1);
  }

  FibScratch(const FibForm& form, void* memory) {
    vf* next = static_cast<vf*>(memory);
    const auto take = [&next](int count) {
      vf* taken = next;
      next += count;
      return taken;
    };
    low = reinterpret_cast<vd*>(take(form.dim));
    high = reinterpret_cast<vd*>(take(form.dim));
    turned = reinterpret_cast<vd*>(take(form.dim));
    unit = take(form.dim);
    scaled = take(form.dim);
    index = reinterpret_cast<vi*>(take(form.blocks()));
    best = reinterpret_cast<vi*>(take(form.blocks()));
    words = reinterpret_cast<vi*>(take(num_words(form) + 1));
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
  if (form.forward.rounds) {
    hadamard(wide_signs(form.forward), form.forward.rounds, form.dim, x);
    return;
  }
  multiply(form.matrix, form.dim, x, turned);
  for (int i = 0; i < form.dim; ++i) x[i] = turned[i];
}

// Rotated unit vectors and their lengths, everything that comes before their rounding in float64. False: a row was
// not finite. The squares of float32 numbers neither overflow nor vanish in float64.
template <Element element>
static bool rotate_exactly(const FibForm& form, const void* rows, int count, const FibScratch& scratch, Wide& length) {
  Wide energy;
  read_rows<element>(rows, count, form.dim, [&](int i, vf lanes) {
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

// The same in float32, for codes that need not be exact. False: a row is not finite, zero, tiny or huge, and it takes
// the exact way to tell which.
template <Element element>
static bool rotate_quickly(const FibForm& form, const void* rows, int count, const FibScratch& scratch, Wide& length) {
  vf energy{};
  read_rows<element>(rows, count, form.dim, [&](int i, vf lanes) {
    scratch.unit[i] = lanes;
    energy = multiply_add(lanes, lanes, energy);
  });
  if (any(~(energy > splat(1e-20f) && energy < splat(1e20f)))) return false;
  length = {square_root(widen_low(energy)), square_root(widen_high(energy))};
  hadamard(narrow_signs(form.forward), form.forward.rounds, form.dim, scratch.unit);
  const vf inverse = narrow(splat_wide(form.forward_scale) / length.low, splat_wide(form.forward_scale) / length.high);
  for (int i = 0; i < form.dim; ++i) scratch.unit[i] *= inverse;
  return true;
}

// <u, q> and <q, q> of a unit vector and the codewords chosen for it.
struct Fit {
  Wide along, energy;
};

static Fit fit(const FibForm& form, const vf* unit, const vi* index) {
  Fit sums;
  const auto add = [&sums](vf u, vf q) {
    const vd low = widen_low(q), high = widen_high(q);
    sums.along.low = multiply_add(widen_low(u), low, sums.along.low);
    sums.along.high = multiply_add(widen_high(u), high, sums.along.high);
    sums.energy.low = multiply_add(low, low, sums.energy.low);
    sums.energy.high = multiply_add(high, high, sums.energy.high);
  };
  const int blocks = form.blocks(), k = form.block;
  for (int b = 0; b < blocks; ++b) {
    if (k == 2) {
      vf x, y;
      gather_pairs(form.codewords, index[b], x, y);
      add(unit[2 * b], x);
      add(unit[2 * b + 1], y);
    } else {
      for (int i = 0; i < k; ++i) add(unit[k * b + i], as_float(gather(form.codewords + i, index[b] * splat(k))));
    }
  }
  return sums;
}

// The same in float32, for codes that need not be exact: it errs by some 1e-7, a step of a float16 norm is 1e-3.
static Fit fit_quickly(const FibForm& form, const vf* unit, const vi* index) {
  vf along{}, energy{};
  const int blocks = form.blocks();
  for (int b = 0; b < blocks; ++b) {
    vf x, y;
    gather_pairs(form.codewords, index[b], x, y);
    along = multiply_add(unit[2 * b], x, multiply_add(unit[2 * b + 1], y, along));
    energy = multiply_add(x, x, multiply_add(y, y, energy));
  }
  return {{widen_low(along), widen_high(along)}, {widen_low(energy), widen_high(energy)}};
}

// max(<u, q> / <q, q>, 0), and 0 for q = 0.
static inline vd gain(vd along, vd energy) {
  const vd best = along * reciprocal_or_zero(energy);
  return best > vd{} ? best : vd{};
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

// Tries each factor on the unit vectors and keeps the codes whose direction fits best, the first of equals.
static Fit search_scales(const FibForm& form, const FibScratch& scratch) {
  Fit kept;
  Wide best;
  for (int s = 0; s < form.num_scales; ++s) {
    const vf scale = splat(form.scales[s]);
    for (int i = 0; i < form.dim; ++i) scratch.scaled[i] = scratch.unit[i] * scale;
    search(form, scratch.scaled, scratch.index);
    const Fit tried = fit(form, scratch.unit, scratch.index);
    const Wide found{cosine(tried.along.low, tried.energy.low), cosine(tried.along.high, tried.energy.high)};
    if (s == 0) {
      kept = tried;
      best = found;
      for (int b = 0; b < form.blocks(); ++b) scratch.best[b] = scratch.index[b];
      continue;
    }
    const vi better = lanes_above(found, best);
    for (int b = 0; b < form.blocks(); ++b) scratch.best[b] = choose(better, scratch.index[b], scratch.best[b]);
    for (int i = 0; i < kHalf; ++i) {
      if (better[i]) {
        best.low[i] = found.low[i];
        kept.along.low[i] = tried.along.low[i];
        kept.energy.low[i] = tried.energy.low[i];
      }
      if (better[kHalf + i]) {
        best.high[i] = found.high[i];
        kept.along.high[i] = tried.along.high[i];
        kept.energy.high[i] = tried.energy.high[i];
      }
    }
  }
  return kept;
}

// Up to kLanes rows.
template <Element element>
static bool encode_batch(const FibForm& form, const void* rows, int count, uint8_t* codes, double* norms,
                         const FibScratch& scratch) {
  Wide length;
  const bool quick = form.search == Search::table && form.forward.rounds &&
                     rotate_quickly<element>(form, rows, count, scratch, length);
  if (!quick && !rotate_exactly<element>(form, rows, count, scratch, length)) return false;
  const vi* index = scratch.index;
  Fit sums;
  if (form.num_scales > 1 || form.scales[0] != 1.0f) {
    sums = search_scales(form, scratch);
    index = scratch.best;
  } else {
    search(form, scratch.unit, scratch.index);
    if (form.gain_corrected) sums = quick ? fit_quickly(form, scratch.unit, index) : fit(form, scratch.unit, index);
  }
  if (form.gain_corrected) {
    length.low *= gain(sums.along.low, sums.energy.low);
    length.high *= gain(sums.along.high, sums.energy.high);
  }
  for (int lane = 0; lane < count; ++lane) norms[lane] = lane < kHalf ? length.low[lane] : length.high[lane - kHalf];
  pack_lanes(form, index, scratch.words);
  write_codes(form, scratch.words, count, codes);
  return true;
}

template <Element element>
static bool encode_rows(const FibForm& form, const void* rows, int64_t count, uint8_t* codes, double* norms,
                        void* memory) {
  const FibScratch scratch(form, memory);
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  for (int64_t start = 0; start < count; start += kLanes) {
    const int some = count - start < kLanes ? (int)(count - start) : kLanes;
    if (!encode_batch<element>(form, from + start * form.dim, some, codes + start * form.code_bytes(), norms + start,
                               scratch)) {
      return false;
    }
  }
  return true;
}

// The codewords of indices [blocks], coordinate by coordinate.
static void look_up(const FibForm& form, const vi* index, vf* y) {
  const int blocks = form.blocks(), k = form.block;
  for (int b = 0; b < blocks; ++b) {
    if (k == 2) {
      gather_pairs(form.codewords, index[b], y[2 * b], y[2 * b + 1]);
    } else {
      for (int i = 0; i < k; ++i) y[k * b + i] = as_float(gather(form.codewords + i, index[b] * splat(k)));
    }
  }
}

template <Element element>
static void decode_batch(const FibForm& form, const uint8_t* codes, const float* norms, int count, void* out,
                         const FibScratch& scratch) {
  read_codes(form, codes, count, scratch.words);
  unpack_lanes(form, scratch.words, scratch.index);
  look_up(form, scratch.index, scratch.unit);
  vf norm{};
  for (int lane = 0; lane < count; ++lane) norm[lane] = norms[lane];
  if (form.backward.rounds) {
    hadamard(narrow_signs(form.backward), form.backward.rounds, form.dim, scratch.unit);
    const vf* y = scratch.unit;
    write_rows<element>(out, count, form.dim, [&](int i) { return y[i] * splat(form.output_scale[i]) * norm; });
  } else {
    multiply(form.transposed, form.dim, scratch.unit, scratch.scaled);
    const vf* y = scratch.scaled;
    write_rows<element>(out, count, form.dim, [&](int i) { return y[i] * norm; });
  }
}

template <Element element>
static void decode_rows(const FibForm& form, const uint8_t* codes, const float* norms, int64_t count, void* out,
                        void* memory) {
  const FibScratch scratch(form, memory);
  auto* to = static_cast<typename Format<element>::stored*>(out);
  for (int64_t start = 0; start < count; start += kLanes) {
    const int some = count - start < kLanes ? (int)(count - start) : kLanes;
    decode_batch<element>(form, codes + start * form.code_bytes(), norms + start, some, to + start * form.dim,
                          scratch);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
