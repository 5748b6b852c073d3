// klt: kLanes vectors of one head from memory to codes, and back.
#pragma once

#include "encode_fit.h"
#include "encode_search.h"

namespace fibkv {
namespace FIBKV_ISA {

// Working memory of a batch.
struct KltScratch {
  vd *low, *high;  // [d] and [d]: coordinates in float64, half of the lanes each
  vf* unit;        // [d]
  vi *index, *best, *words;

  static size_t registers(const KltForm& form) { return 4 * (size_t)form.dim + num_words(form.code_bytes) + 2; }

  KltScratch(const KltForm& form, void* memory) {
    Room room(memory);
    room.take(form.dim, low);
    room.take(form.dim, high);
    room.take(form.dim, unit);
    room.take(form.dim / 2, index);
    room.take(form.dim / 2, best);
    room.take(num_words(form.code_bytes) + 2, words);
  }
};

static size_t klt_scratch_bytes(const KltForm& form) { return sizeof(vf) * KltScratch::registers(form); }

static inline vd one_for_zero(vd v) { return v == vd{} ? splat_wide(1.0) : v; }

// Vectors whose coded coordinates have a mean square of 1, and their norms; what comes before their rounding is float64.
// False: a row was not finite.
template <Element element>
static bool to_units(const KltForm& form, const uint8_t* widths, const void* rows, int count,
                     const KltScratch& scratch, Wide& length) {
  Wide energy, other;
  read_rows<element>(rows, count, form.dim, [&](int i, vf lanes) {
    const vd low = widen_low(lanes), high = widen_high(lanes);
    scratch.low[i] = low;
    scratch.high[i] = high;
    Wide& sum = widths[i / 2] ? energy : other;
    sum.low = multiply_add(low, low, sum.low);
    sum.high = multiply_add(high, high, sum.high);
  });
  if (!all_finite(energy.low + other.low) || !all_finite(energy.high + other.high)) return false;
  int coded = 0;
  for (int pair = 0; pair < form.dim / 2; ++pair) coded += widths[pair] ? 2 : 0;
  length = {square_root(energy.low / splat_wide(coded)), square_root(energy.high / splat_wide(coded))};
  const vd low = one_for_zero(length.low), high = one_for_zero(length.high);
  for (int i = 0; i < form.dim; ++i) scratch.unit[i] = narrow(scratch.low[i] / low, scratch.high[i] / high);
  return true;
}

// Adds a coordinate of pairs that weigh so much.
static inline void add_weighted(Fit& sums, vd weight, vf u, vf q) {
  const vd low = widen_low(q), high = widen_high(q);
  sums.along.low = multiply_add(widen_low(u), low * weight, sums.along.low);
  sums.along.high = multiply_add(widen_high(u), high * weight, sums.along.high);
  sums.energy.low = multiply_add(low, low * weight, sums.energy.low);
  sums.energy.high = multiply_add(high, high * weight, sums.energy.high);
}

// The indices for one factor, and how well they fit.
static Fit search_pairs(const KltForm& form, int head, float factor, const KltScratch& scratch) {
  const int pairs = form.dim / 2;
  const uint8_t* widths = form.widths + (int64_t)head * pairs;
  const double* weights = form.weights + (int64_t)head * pairs;
  const auto level_of = [&](int pair) -> const FibForm& { return *form.levels[widths[pair] / 2]; };
  const auto scaled = [&](int i) { return scratch.unit[i] * splat(factor); };
  for (int pair = 0; pair < pairs; ++pair) {
    const bool is_coded = widths[pair] > 0;
    scratch.index[pair] = is_coded ? cell_of(level_of(pair).square, scaled(2 * pair), scaled(2 * pair + 1)) : vi{};
  }
  for (int pair = 0; pair < pairs; ++pair) {
    if (!widths[pair]) continue;
    const vf block[2] = {scaled(2 * pair), scaled(2 * pair + 1)};
    scratch.index[pair] = nearest_on_grid(level_of(pair), block, scratch.index + pair);
  }
  Fit sums;
  for (int pair = 0; pair < pairs; ++pair) {
    if (!widths[pair]) continue;
    vf x, y;
    gather_each_pair(level_of(pair).codewords, scratch.index + pair, x, y);
    add_weighted(sums, splat_wide(weights[pair]), scratch.unit[2 * pair], x);
    add_weighted(sums, splat_wide(weights[pair]), scratch.unit[2 * pair + 1], y);
  }
  return sums;
}

// As pack_lanes, each index with its own width.
static void pack_widths(const uint8_t* widths, int pairs, const vi* index, vi* words) {
  vu open{};
  int filled = 0, word = 0;
  for (int pair = 0; pair < pairs; ++pair) {
    const vu value = (vu)index[pair];
    open |= value << filled;
    filled += widths[pair];
    if (filled >= 32) {
      words[word++] = (vi)open;
      filled -= 32;
      open = filled ? value >> (widths[pair] - filled) : vu{};
    }
  }
  words[word] = (vi)open;
}

static void unpack_widths(const uint8_t* widths, int pairs, const vi* words, vi* index) {
  int bit = 0;
  for (int pair = 0; pair < pairs; bit += widths[pair], ++pair) {
    const int word = bit / 32, offset = bit % 32;
    vu value = (vu)words[word] >> offset;
    if (offset + widths[pair] > 32) value |= (vu)words[word + 1] << (32 - offset);
    index[pair] = (vi)value & splat((1 << widths[pair]) - 1);
  }
}

template <Element element>
static bool encode_klt_rows(const KltForm& form, int head, const void* rows, int64_t count, uint8_t* codes,
                            double* norms, void* memory) {
  const KltScratch scratch(form, memory);
  const int pairs = form.dim / 2;
  const uint8_t* widths = form.widths + (int64_t)head * pairs;
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  for (int64_t start = 0; start < count; start += kLanes) {
    const int some = count - start < kLanes ? (int)(count - start) : kLanes;
    Wide length;
    if (!to_units<element>(form, widths, from + start * form.dim, some, scratch, length)) return false;
    Best best;
    for (int s = 0; s < form.num_scales; ++s) {
      const Fit found = search_pairs(form, head, form.scales[s], scratch);
      best.offer(found, pairs, scratch.index, scratch.best);
    }
    write_norms(with_gain(length, best.fit), some, norms + start);
    pack_widths(widths, pairs, scratch.best, scratch.words);
    write_codes(form.code_bytes, scratch.words, some, codes + start * form.code_bytes);
  }
  return true;
}

template <Element element>
static void decode_klt_rows(const KltForm& form, int head, const uint8_t* codes, const float* norms, int64_t count,
                            void* out, void* memory) {
  const KltScratch scratch(form, memory);
  const int pairs = form.dim / 2;
  const uint8_t* widths = form.widths + (int64_t)head * pairs;
  auto* to = static_cast<typename Format<element>::stored*>(out);
  for (int64_t start = 0; start < count; start += kLanes) {
    const int some = count - start < kLanes ? (int)(count - start) : kLanes;
    read_codes(form.code_bytes, codes + start * form.code_bytes, some, scratch.words);
    unpack_widths(widths, pairs, scratch.words, scratch.index);
    vf norm{};
    for (int lane = 0; lane < some; ++lane) norm[lane] = norms[start + lane];
    for (int pair = 0; pair < pairs; ++pair) {
      vf x{}, y{};
      if (widths[pair]) gather_each_pair(form.levels[widths[pair] / 2]->codewords, scratch.index + pair, x, y);
      scratch.unit[2 * pair] = x * norm;
      scratch.unit[2 * pair + 1] = y * norm;
    }
    write_rows<element>(to + start * form.dim, some, form.dim, [&](int i) { return scratch.unit[i]; });
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
