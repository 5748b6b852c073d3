// FibQuant: kLanes vectors from memory to codes, and back.
#pragma once

#include "encode_fit.h"
#include "encode_search.h"
#include "encode_table.h"
#include "encode_trellis.h"
#include "encode_word_rows.h"

namespace fibkv {
namespace FIBKV_ISA {

// The first of these is working memory of all codes, the second of trellis codes, the third of those that are rotated in
// integers.
struct Working {
  FibScratch scratch;
  PathScratch paths;
  WordScratch turning;

  Working(const FibForm& form, void* memory)
      : scratch(form, memory),
        paths(form, static_cast<vf*>(memory) + FibScratch::registers(form)),
        turning(form.dim, static_cast<vf*>(memory) + registers_before_turning(form)) {}

  static size_t registers(const FibForm& form) {
    return registers_before_turning(form) + (form.words ? WordScratch::registers(form.dim) : 0);
  }

 private:
  static size_t registers_before_turning(const FibForm& form) {
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

// Norms and codes of up to kLanes rotated unit vectors, `scratch.unit`, with the lengths that they had.
static void encode_units(const FibForm& form, const Wide& length, int count, uint8_t* codes, double* norms,
                         const Working& working) {
  const FibScratch& scratch = working.scratch;
  const vi* index = scratch.index;
  Fit sums;
  if (form.num_scales > 1 || form.scales[0] != 1.0f) {
    sums = search_scales(form, working);
    index = scratch.best;
  } else {
    find_codes(form, working, scratch.unit);
    if (form.gain_corrected) sums = fit(form, scratch.unit, index);
  }
  write_batch(form, index, length, sums, count, codes, norms, scratch.words);
}

// Up to kLanes rows. False: a row was not finite.
template <Element element>
static bool encode_batch(const FibForm& form, const typename Format<element>::stored* rows, int count, uint8_t* codes,
                         double* norms, const Working& working) {
  Wide length;
  if (!rotate_exactly<element>(form, rows, count, working.scratch, length)) return false;
  encode_units(form, length, count, codes, norms, working);
  return true;
}

// Up to 2 kLanes rows, rotated in integers. False: a row was not finite.
template <Element element>
static bool encode_in_words(const FibForm& form, const typename Format<element>::stored* rows, int count,
                            uint8_t* codes, double* norms, const Working& working) {
  Wide length[2];
  if (!rotate_rows<element>(*form.words, rows, count, working.turning, length)) return false;
  const vw* const rotated = working.turning.rotated;
  for (int half = 0, first = 0; first < count; ++half, first += kLanes) {
    for (int i = 0; i < form.dim; ++i) {
      working.scratch.unit[i] = as_numbers(half ? upper_words(rotated[i]) : lower_words(rotated[i])) * splat(form.word_unit);
    }
    const int some = count - first < kLanes ? count - first : kLanes;
    encode_units(form, length[half], some, codes + first * form.code_bytes(), norms + first, working);
  }
  return true;
}

static size_t scratch_bytes(const FibForm& form) {
  const size_t batch = Working::registers(form);
  const size_t table = form.table ? TableScratch::registers(form) : 0;
  return sizeof(vf) * (batch > table ? batch : table);
}

template <Element element>
static bool encode_rows(const FibForm& form, const void* rows, int64_t count, uint8_t* codes, double* norms,
                        void* memory) {
  if (form.table) return encode_rows_by_table<element>(form, rows, count, codes, norms, memory);
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  const Working working(form, memory);
  const auto encode = form.words ? encode_in_words<element> : encode_batch<element>;
  const int batch = form.words ? 2 * kLanes : kLanes;
  for (int64_t start = 0; start < count; start += batch) {
    const int some = count - start < batch ? (int)(count - start) : batch;
    if (!encode(form, from + start * form.dim, some, codes + start * form.code_bytes(), norms + start, working)) {
      return false;
    }
  }
  return true;
}

// The codewords of indices [blocks], coordinate by coordinate.
static void look_up(const FibForm& form, const vi* index, vf* y) {
  each_coordinate(form, index, [y](int i, vf q) { y[i] = q; });
}

// The same where bytes name the pairs of a whole book, from the words that have four of them.
static void look_up_bytes(const FibForm& form, const vi* words, vf* y) {
  for (int b = 0; b < form.blocks(); b += 4) {
    vf first[4], second[4];
    look_up_pairs(form, words[b / 4], first, second);
    for (int i = 0; i < 4 && b + i < form.blocks(); ++i) {
      y[2 * (b + i)] = first[i];
      y[2 * (b + i) + 1] = second[i];
    }
  }
}

template <Element element>
static void decode_batch(const FibForm& form, const uint8_t* codes, const float* norms, int count, void* out,
                         const FibScratch& scratch) {
  read_codes(form.code_bytes(), codes, count, scratch.words);
  if (form.pair_planes && form.size == 256) {
    look_up_bytes(form, scratch.words, scratch.unit);
  } else {
    unpack_lanes(form, scratch.words, scratch.index);
    if (form.trellis) open_windows(form, scratch.index);
    look_up(form, scratch.index, scratch.unit);
  }
  vf norm{};
  for (int lane = 0; lane < count; ++lane) norm[lane] = norms[lane];
  if (form.rounds) {
    rotate(form.back_signs, form.rounds, form.dim, scratch.unit);
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
