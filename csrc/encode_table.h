// FibQuant by decision table: 2 kLanes vectors at a time, rotated in integers of 16 bits (see TableForm).
#pragma once

#include "encode_word_rows.h"

namespace fibkv {
namespace FIBKV_ISA {

// Working memory of a batch.
struct TableScratch {
  WordScratch turning;
  vw* cells;      // [blocks]
  vi* quads[2];   // [blocks / 4] each: indices of four blocks in the bytes of a lane
  vi* best[2];    // [blocks / 4] each: those of the best factor
  vi* index;      // [blocks]
  vi* words;      // [words of a code, and one]

  static size_t registers(const FibForm& form) {
    return WordScratch::registers(form.dim) + 3 * form.blocks() + num_words(form) + 1;
  }

  TableScratch(const FibForm& form, void* memory) : turning(form.dim, memory) {
    Room room(static_cast<vf*>(memory) + WordScratch::registers(form.dim));
    room.take(form.blocks(), cells);
    for (vi*& half : quads) room.take(form.blocks() / 4, half);
    for (vi*& half : best) room.take(form.blocks() / 4, half);
    room.take(form.blocks(), index);
    room.take(num_words(form) + 1, words);
  }

  const vw* rotated() const { return turning.rotated; }
};

// The bytes of a table at the offsets of four blocks, for both halves of lanes.
#if defined(__SSE4_1__)
static inline void look_up(const uint8_t* table, const vw* offsets, vi* lower, vi* upper) {
  typedef uint8_t four_lanes __attribute__((vector_size(16)));
  for (int lane = 0; lane < kLanes; lane += 4) {
    four_lanes low{}, high{};
#pragma GCC unroll 4
    for (int block = 0; block < 4; ++block) {
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        uint64_t of_lanes;
        std::memcpy(&of_lanes, (const char*)(offsets + block) + 4 * lane + 8 * pair, sizeof of_lanes);
        low[8 * pair + block] = table[of_lanes & 0xFFFF];
        high[8 * pair + block] = table[of_lanes >> 16 & 0xFFFF];
        low[8 * pair + 4 + block] = table[of_lanes >> 32 & 0xFFFF];
        high[8 * pair + 4 + block] = table[of_lanes >> 48];
      }
    }
    store((char*)lower + 4 * lane, low);
    store((char*)upper + 4 * lane, high);
  }
}
#else
static inline void look_up(const uint8_t* table, const vw* offsets, vi* lower, vi* upper) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t low = 0, high = 0;
#pragma GCC unroll 4
    for (int block = 0; block < 4; ++block) {
      const uint32_t both = ((vu)offsets[block])[lane];
      low |= (uint32_t)table[both & 0xFFFF] << (8 * block);
      high |= (uint32_t)table[both >> 16] << (8 * block);
    }
    (*lower)[lane] = (int32_t)low;
    (*upper)[lane] = (int32_t)high;
  }
}
#endif

// Indices of codewords, `scratch.quads`, for rotated vectors times a factor.
static void find_cells(const FibForm& form, const CellScale& scale, const TableScratch& scratch) {
  const int blocks = form.blocks();
  const vw low = splat_word(-scale.limit), high = splat_word(scale.limit - 1), slope = splat_word(scale.slope);
  const auto place = [&](vw x) { return multiply_high(minimum(maximum(x, low), high), slope); };
  for (int b = 0; b < blocks; ++b) {
    scratch.cells[b] = (place(scratch.rotated()[2 * b]) << 8) + place(scratch.rotated()[2 * b + 1]);
  }
  for (int b = 0; b < blocks; b += 4) {
    look_up(form.table->cells, scratch.cells + b, scratch.quads[0] + b / 4, scratch.quads[1] + b / 4);
  }
}

// The words of codewords that byte i of each lane names.
static inline void look_up_words(const TableForm& form, vi bytes, vi* words) {
#if defined(__AVX512F__)
  look_up_four(form.planes, bytes, words);
#else
  for (int i = 0; i < 4; ++i) words[i] = gather(form.words, byte_of(bytes, i));
#endif
}

static inline Wide times(vi v, double unit) {
  Wide wide;
  for (int i = 0; i < kHalf; ++i) {
    wide.low[i] = v[i] * unit;
    wide.high[i] = v[kHalf + i] * unit;
  }
  return wide;
}

// The sums of a fit in integers.
struct WordFit {
  vi along{}, energy{};

  // Of one block: the pairs of its coordinates, and the words found for them.
  void add(vi pairs, vi words) {
    along = add_products(along, pairs, words);
    energy = add_products(energy, words, words);
  }

  Fit in_units_of(const TableForm& form) const {
    return {times(along, form.along_unit), times(energy, form.energy_unit)};
  }
};

// As `fit`, of both halves of the vectors.
static void fit_words(const FibForm& form, const TableScratch& scratch, Fit* fits) {
  const vw* const rotated = scratch.rotated();
  WordFit lower, upper;
  for (int b = 0; b < form.blocks(); b += 4) {
    vi words[2][4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) look_up_words(*form.table, scratch.quads[half][b / 4], words[half]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vi x = (vi)rotated[2 * (b + i)], y = (vi)rotated[2 * (b + i) + 1];
      lower.add(pair_lower(x, y), words[0][i]);
      upper.add(pair_upper(x, y), words[1][i]);
    }
  }
  fits[0] = lower.in_units_of(*form.table);
  fits[1] = upper.in_units_of(*form.table);
}

// Norms and codes of `count` rows.
static void write_quads(const FibForm& form, const vi* quads, Wide length, const Fit& sums, int count, uint8_t* codes,
                        double* norms, const TableScratch& scratch) {
  if (form.gain_corrected) length = with_gain(length, sums);
  write_norms(length, count, norms);
  if (form.bits == 8) return write_codes(form.code_bytes(), quads, count, codes);
  for (int b = 0; b < form.blocks(); ++b) scratch.index[b] = byte_of(quads[b / 4], b % 4);
  pack_lanes(form, scratch.index, scratch.words);
  write_codes(form.code_bytes(), scratch.words, count, codes);
}

// Up to 2 kLanes rows. False: a row was not finite.
template <Element element>
static bool encode_by_table(const FibForm& form, const typename Format<element>::stored* rows, int count,
                            uint8_t* codes, double* norms, const TableScratch& scratch) {
  const int halves = count > kLanes ? 2 : 1;
  Wide length[2];
  if (!rotate_rows<element>(form.table->rotation, rows, count, scratch.turning, length)) return false;
  const auto write = [&](int half, const vi* quads, const Fit& sums) {
    const int first = half * kLanes, some = count - first < kLanes ? count - first : kLanes;
    write_quads(form, quads, length[half], sums, some, codes + first * form.code_bytes(), norms + first, scratch);
  };
  Fit fits[2];
  if (form.num_scales == 1) {
    find_cells(form, form.table->scales[0], scratch);
    fit_words(form, scratch, fits);
    for (int half = 0; half < halves; ++half) write(half, scratch.quads[half], fits[half]);
    return true;
  }
  Best best[2];
  for (int s = 0; s < form.num_scales; ++s) {
    find_cells(form, form.table->scales[s], scratch);
    fit_words(form, scratch, fits);
    for (int half = 0; half < halves; ++half) {
      best[half].offer(fits[half], form.blocks() / 4, scratch.quads[half], scratch.best[half]);
    }
  }
  for (int half = 0; half < halves; ++half) write(half, scratch.best[half], best[half].fit);
  return true;
}

template <Element element>
static bool encode_rows_by_table(const FibForm& form, const void* rows, int64_t count, uint8_t* codes, double* norms,
                                 void* memory) {
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  const TableScratch scratch(form, memory);
  for (int64_t start = 0; start < count; start += 2 * kLanes) {
    const int some = count - start < 2 * kLanes ? (int)(count - start) : 2 * kLanes;
    if (!encode_by_table<element>(form, from + start * form.dim, some, codes + start * form.code_bytes(),
                                  norms + start, scratch)) {
      return false;
    }
  }
  return true;
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
