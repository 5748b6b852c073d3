// FibQuant by decision table: 2 kLanes vectors at a time, rotated in integers of 16 bits (see TableForm).
#pragma once

#include "encode_fit.h"

namespace fibkv {
namespace FIBKV_ISA {

// Working memory of a batch.
struct TableScratch {
  vf* rows[2];    // [d] each: coordinates of the first kLanes vectors, and of the others, where they need float32
  vw* rotated;    // [d], and coordinates of 16 bits before that
  vw* cells;      // [blocks]
  vi* quads[2];   // [blocks / 4] each: indices of four blocks in the bytes of a lane
  vi* best[2];    // [blocks / 4] each: those of the best factor
  vi* index;      // [blocks]
  vi* words;      // [words of a code, and one]

  static size_t registers(const FibForm& form) {
    return 3 * (size_t)form.dim + 3 * form.blocks() + num_words(form) + 1;
  }

  TableScratch(const FibForm& form, void* memory) {
    vf* next = static_cast<vf*>(memory);
    const auto take = [&next](int count) {
      vf* taken = next;
      next += count;
      return taken;
    };
    for (vf*& half : rows) half = take(form.dim);
    rotated = reinterpret_cast<vw*>(take(form.dim));
    cells = reinterpret_cast<vw*>(take(form.blocks()));
    for (vi*& half : quads) half = reinterpret_cast<vi*>(take(form.blocks() / 4));
    for (vi*& half : best) half = reinterpret_cast<vi*>(take(form.blocks() / 4));
    index = reinterpret_cast<vi*>(take(form.blocks()));
    words = reinterpret_cast<vi*>(take(num_words(form) + 1));
  }
};

// Halves of the lanes of a register that has coordinates of 16 bits.
template <Element element>
static inline vf lower_half(vi raw) { return Format<element>::widen(low_halves(raw)); }
template <Element element>
static inline vf upper_half(vi raw) { return Format<element>::widen(low_halves((vi)((vu)raw >> 16))); }
template <>
inline vf lower_half<Element::bf16>(vi raw) { return as_float(raw << 16); }
template <>
inline vf upper_half<Element::bf16>(vi raw) { return as_float(raw & splat((int)0xFFFF0000)); }

// Reads up to 2 kLanes rows of 16-bit elements: raw [d], as registers of words. d is a multiple of 2 kLanes. Lanes
// without a row repeat the last one.
static void read_pairs(const uint16_t* rows, int count, int dim, vi* raw) {
  const uint16_t* row[2 * kLanes];
  for (int lane = 0; lane < 2 * kLanes; ++lane) row[lane] = rows + (int64_t)(lane < count ? lane : count - 1) * dim;
  for (int first = 0; first < dim; first += 2 * kLanes) {
    vi even[kLanes], odd[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      const vu a = load<vu>(row[lane] + first), b = load<vu>(row[lane + kLanes] + first);
      even[lane] = (vi)((a & 0xFFFF) | b << 16);
      odd[lane] = (vi)(a >> 16 | (b & 0xFFFF0000));
    }
    transpose(even);
    transpose(odd);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      raw[first + 2 * i] = even[i];
      raw[first + 2 * i + 1] = odd[i];
    }
  }
}

// Sum of squares of coordinates x(0 .. dim - 1), in four parts that do not wait for each other.
template <class X>
static inline vf energy_of(int dim, X x) {
  vf part[4] = {};
  for (int i = 0; i < dim; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] += x(i + j) * x(i + j);
  }
  return part[0] + part[1] + (part[2] + part[3]);
}

// Which lanes have an energy that float32 holds well, with the squares that make it.
static inline vi is_ordinary(vf energy) { return (energy > splat(1e-20f)) & (energy < splat(1e20f)); }

static inline Wide root(vf v) { return {square_root(widen_low(v)), square_root(widen_high(v))}; }

// What makes vectors of these lengths ones of another, and its negative: 0 for zero.
struct Scale {
  vf by[2]{};

  Scale() = default;
  Scale(float wanted, const Wide& length) {
    const vd to = splat_wide(wanted);
    by[0] = narrow(to * reciprocal_or_zero(length.low), to * reciprocal_or_zero(length.high));
    by[1] = -by[0];
  }
};

// The integers nearest to numbers below 2^15, in the lower halves of lanes: the upper ones are not theirs.
static inline vi nearest_words(vf x) { return as_int(x + splat(12582912.0f)); }  // 1.5 * 2^23

// Rotated vectors from coordinates lower(i) and upper(i) of both halves. Meanwhile the rows behind those at `rows`, which
// come next, are fetched as far as the second cache: rotations need no memory, and tables fill the first.
template <class Element, class Lower, class Upper>
static void rotate_both(const FibForm& form, const Element* rows, const Scale* scale, Lower lower, Upper upper,
                        vw* rotated) {
  const int32_t* factors = form.table->factors;
  const Element* next = rows + 2 * kLanes * form.dim;
  for (int i = 0; i < form.dim; ++i, next += 2 * kLanes) {
    __builtin_prefetch(next, 0, 2);
    const int negative = factors[i] < 0;
    rotated[i] = pack_words(nearest_words(lower(i) * scale[0].by[negative]),
                            nearest_words(upper(i) * scale[1].by[negative]));
  }
  rotate(factors, form.rounds, form.dim, rotated);
}

// Divides the vector of one lane of x [d] by the power of two that leaves its largest magnitude between 1 and 2, and
// returns that; 1 for zero, infinity where an element is not finite.
static double take_power(vf* x, int dim, int lane) {
  float largest = 0;
  for (int i = 0; i < dim; ++i) {
    const float magnitude = __builtin_fabsf(x[i][lane]);
    if (!__builtin_isfinite(magnitude)) return __builtin_inf();
    if (magnitude > largest) largest = magnitude;
  }
  if (largest == 0) return 1;
  const double power = __builtin_ldexp(1.0, __builtin_ilogbf(largest));
  for (int i = 0; i < dim; ++i) x[i][lane] = (float)(x[i][lane] / power);
  return power;
}

// Rows in float32, of which any may be zero, tiny or huge: those are divided by a power of two. False: one is not finite.
template <Element element>
static bool rotate_any(const FibForm& form, const typename Format<element>::stored* rows, int count,
                       const TableScratch& scratch, Wide* length) {
  Scale scale[2];
  for (int half = 0; half < 2; ++half) {
    const int first = half * kLanes < count ? half * kLanes : count - 1;
    vf* const x = scratch.rows[half];
    read_rows<element>(rows + (int64_t)first * form.dim, count - first < kLanes ? count - first : kLanes, form.dim,
                       [x](int i, vf lanes) { x[i] = lanes; });
    const auto coordinate = [x](int i) { return x[i]; };
    const vi ordinary = is_ordinary(energy_of(form.dim, coordinate));
    double power[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      power[lane] = ordinary[lane] ? 1 : take_power(x, form.dim, lane);
      if (!__builtin_isfinite(power[lane])) return false;
    }
    length[half] = root(energy_of(form.dim, coordinate));
    scale[half] = Scale(form.table->length, length[half]);
    for (int i = 0; i < kHalf; ++i) {
      length[half].low[i] *= power[i];
      length[half].high[i] *= power[kHalf + i];
    }
  }
  const vf *lower = scratch.rows[0], *upper = scratch.rows[1];
  rotate_both(form, rows, scale, [=](int i) { return lower[i]; }, [=](int i) { return upper[i]; }, scratch.rotated);
  return true;
}

// Rotates up to 2 kLanes rows, `scratch.rotated`. False: a row was not finite.
template <Element element>
static bool rotate_rows(const FibForm& form, const typename Format<element>::stored* rows, int count,
                        const TableScratch& scratch, Wide* length) {
  if constexpr (element != Element::f32) {
    if (form.dim % (2 * kLanes) == 0) {
      vi* const raw = reinterpret_cast<vi*>(scratch.rotated);
      read_pairs(rows, count, form.dim, raw);
      const auto lower = [=](int i) { return lower_half<element>(raw[i]); };
      const auto upper = [=](int i) { return upper_half<element>(raw[i]); };
      const vf energy[2] = {energy_of(form.dim, lower), energy_of(form.dim, upper)};
      if (!any(~(is_ordinary(energy[0]) & is_ordinary(energy[1])))) {
        for (int half = 0; half < 2; ++half) length[half] = root(energy[half]);
        const Scale scale[2] = {{form.table->length, length[0]}, {form.table->length, length[1]}};
        rotate_both(form, rows, scale, lower, upper, scratch.rotated);
        return true;
      }
    }
  }
  return rotate_any<element>(form, rows, count, scratch, length);
}

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
    scratch.cells[b] = (place(scratch.rotated[2 * b]) << 8) + place(scratch.rotated[2 * b + 1]);
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

// As `fit`, of half the vectors.
static Fit fit_words(const FibForm& form, const TableScratch& scratch, int half) {
  vi along{}, energy{};
  for (int b = 0; b < form.blocks(); b += 4) {
    vi words[4];
    look_up_words(*form.table, scratch.quads[half][b / 4], words);
    for (int i = 0; i < 4; ++i) {
      const vi x = (vi)scratch.rotated[2 * (b + i)], y = (vi)scratch.rotated[2 * (b + i) + 1];
      const vi pairs = half ? (vi)((vu)x >> 16) | (y & splat((int)0xFFFF0000)) : (x & splat(0xFFFF)) | y << 16;
      along = add_products(along, pairs, words[i]);
      energy = add_products(energy, words[i], words[i]);
    }
  }
  return {times(along, form.table->along_unit), times(energy, form.table->energy_unit)};
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
  if (!rotate_rows<element>(form, rows, count, scratch, length)) return false;
  const auto write = [&](int half, const vi* quads, const Fit& sums) {
    const int first = half * kLanes, some = count - first < kLanes ? count - first : kLanes;
    write_quads(form, quads, length[half], sums, some, codes + first * form.code_bytes(), norms + first, scratch);
  };
  if (form.num_scales == 1) {
    find_cells(form, form.table->scales[0], scratch);
    for (int half = 0; half < halves; ++half) write(half, scratch.quads[half], fit_words(form, scratch, half));
    return true;
  }
  Best best[2];
  for (int s = 0; s < form.num_scales; ++s) {
    find_cells(form, form.table->scales[s], scratch);
    for (int half = 0; half < halves; ++half) {
      best[half].offer(fit_words(form, scratch, half), form.blocks() / 4, scratch.quads[half], scratch.best[half]);
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
