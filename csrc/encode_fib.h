// FibQuant: kLanes vectors from memory to codes, and back.
#pragma once

#include "encode_fit.h"
#include "encode_search.h"
#include "encode_trellis.h"

namespace fibkv {
namespace FIBKV_ISA {

// As rotate_exactly in float32, for codes that need not be exact. False: a row is not finite, zero, tiny or huge, and
// it takes the exact way to tell which.
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

// As `fit` in float32, for codes that need not be exact: it errs by some 1e-7, a step of a float16 norm is 1e-3.
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

// The first of these is working memory of all codes, the second of trellis codes.
struct Working {
  FibScratch scratch;
  PathScratch paths;

  Working(const FibForm& form, void* memory)
      : scratch(form, memory), paths(form, static_cast<vf*>(memory) + FibScratch::registers(form)) {}

  static size_t registers(const FibForm& form) {
    return FibScratch::registers(form) + (form.trellis ? PathScratch::registers(form) : 0);
  }
};

// Indices of codewords, `index`, for vectors x [d].
static void find_codes(const FibForm& form, const Working& working, const vf* x) {
  vi* const index = working.scratch.index;
  if (!form.trellis) return search(form, x, index);
  search_paths(form, x, working.paths, index);
  open_windows(form, index);
}

// Tries each factor on the unit vectors.
static Fit search_scales(const FibForm& form, const Working& working) {
  const FibScratch& scratch = working.scratch;
  Best best;
  for (int s = 0; s < form.num_scales; ++s) {
    const vf scale = splat(form.scales[s]);
    for (int i = 0; i < form.dim; ++i) scratch.scaled[i] = scratch.unit[i] * scale;
    find_codes(form, working, scratch.scaled);
    best.offer(form, scratch);
  }
  return best.fit;
}

// Up to kLanes rows.
template <Element element>
static bool encode_batch(const FibForm& form, const void* rows, int count, uint8_t* codes, double* norms,
                         const Working& working) {
  const FibScratch& scratch = working.scratch;
  Wide length;
  const bool quick = form.search == Search::table && form.forward.rounds &&
                     rotate_quickly<element>(form, rows, count, scratch, length);
  if (!quick && !rotate_exactly<element>(form, rows, count, scratch, length)) return false;
  const vi* index = scratch.index;
  Fit sums;
  if (form.num_scales > 1 || form.scales[0] != 1.0f) {
    sums = search_scales(form, working);
    index = scratch.best;
  } else {
    find_codes(form, working, scratch.unit);
    if (form.gain_corrected) sums = quick ? fit_quickly(form, scratch.unit, index) : fit(form, scratch.unit, index);
  }
  write_batch(form, index, length, sums, count, codes, norms, scratch.words);
  return true;
}

static size_t scratch_bytes(const FibForm& form) { return sizeof(vf) * Working::registers(form); }

template <Element element>
static bool encode_rows(const FibForm& form, const void* rows, int64_t count, uint8_t* codes, double* norms,
                        void* memory) {
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  const Working working(form, memory);
  for (int64_t start = 0; start < count; start += kLanes) {
    const int some = count - start < kLanes ? (int)(count - start) : kLanes;
    if (!encode_batch<element>(form, from + start * form.dim, some, codes + start * form.code_bytes(), norms + start,
                               working)) {
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
  read_codes(form.code_bytes(), codes, count, scratch.words);
  unpack_lanes(form, scratch.words, scratch.index);
  if (form.trellis) open_windows(form, scratch.index);
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
