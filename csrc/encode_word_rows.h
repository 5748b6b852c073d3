// Vectors in memory to rotated vectors of words, 2 kLanes at a time. Meaning: src/fibkv/word_rotation.py.
#pragma once

#include "encode_fit.h"

namespace fibkv {
namespace FIBKV_ISA {

struct WordScratch {
  vf* rows[2];  // [d] each: coordinates of the first kLanes vectors, and of the others, where they need float32
  vw* rotated;  // [d], and coordinates of 16 bits before that

  static size_t registers(int dim) { return 3 * (size_t)dim; }

  WordScratch(int dim, void* memory) {
    Room room(memory);
    for (vf*& half : rows) room.take(dim, half);
    room.take(dim, rotated);
  }
};

// Reads up to 2 kLanes rows of 16-bit elements: raw [d], as registers of words. d is a multiple of 2 kLanes. Lanes
// without a row repeat the last one.
static void read_pairs(const uint16_t* rows, int count, int dim, vi* raw) {
  const uint16_t* row[2 * kLanes];
  for (int lane = 0; lane < 2 * kLanes; ++lane) row[lane] = rows + (int64_t)(lane < count ? lane : count - 1) * dim;
  for (int first = 0; first < dim; first += 2 * kLanes) {
    // One after the other: both together do not fit in registers.
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      vi tile[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        const vi a = load<vi>(row[lane] + first), b = load<vi>(row[lane + kLanes] + first);
        tile[lane] = odd ? pair_upper(a, b) : pair_lower(a, b);
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) raw[first + 2 * i + odd] = tile[i];
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
static inline vi is_ordinary(vf energy) { return (energy > splat(0x1p-66f)) & (energy < splat(0x1p66f)); }

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
static void rotate_both(const WordRotation& rotation, const Element* rows, const Scale* scale, Lower lower, Upper upper,
                        vw* rotated) {
  const int32_t* factors = rotation.factors;
  const Element* next = rows + 2 * kLanes * rotation.dim;
  for (int i = 0; i < rotation.dim; ++i, next += 2 * kLanes) {
    __builtin_prefetch(next, 0, 2);
    const int negative = factors[i] < 0;
    rotated[i] = (vw)pair_lower(nearest_words(lower(i) * scale[0].by[negative]),
                                nearest_words(upper(i) * scale[1].by[negative]));
  }
  rotate(factors, rotation.rounds, rotation.dim, rotated);
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
static bool rotate_any(const WordRotation& rotation, const typename Format<element>::stored* rows, int count,
                       const WordScratch& scratch, Wide* length) {
  Scale scale[2];
  for (int half = 0; half < 2; ++half) {
    const int first = half * kLanes < count ? half * kLanes : count - 1;
    vf* const x = scratch.rows[half];
    read_rows<element>(rows + (int64_t)first * rotation.dim, count - first < kLanes ? count - first : kLanes, rotation.dim,
                       [x](int i, vf lanes) { x[i] = lanes; });
    const auto coordinate = [x](int i) { return x[i]; };
    const vi ordinary = is_ordinary(energy_of(rotation.dim, coordinate));
    double power[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      power[lane] = ordinary[lane] ? 1 : take_power(x, rotation.dim, lane);
      if (!__builtin_isfinite(power[lane])) return false;
    }
    length[half] = root(energy_of(rotation.dim, coordinate));
    scale[half] = Scale(rotation.length, length[half]);
    for (int i = 0; i < kHalf; ++i) {
      length[half].low[i] *= power[i];
      length[half].high[i] *= power[kHalf + i];
    }
  }
  const vf *lower = scratch.rows[0], *upper = scratch.rows[1];
  rotate_both(rotation, rows, scale, [=](int i) { return lower[i]; }, [=](int i) { return upper[i]; }, scratch.rotated);
  return true;
}

// Rotates up to 2 kLanes rows, `scratch.rotated`. False: a row was not finite.
template <Element element>
static bool rotate_rows(const WordRotation& rotation, const typename Format<element>::stored* rows, int count,
                        const WordScratch& scratch, Wide* length) {
  if constexpr (element != Element::f32) {
    if (rotation.dim % (2 * kLanes) == 0) {
      vi* const raw = reinterpret_cast<vi*>(scratch.rotated);
      read_pairs(rows, count, rotation.dim, raw);
      const auto lower = [=](int i) { return Format<element>::lower(raw[i]); };
      const auto upper = [=](int i) { return Format<element>::upper(raw[i]); };
      const vf energy[2] = {energy_of(rotation.dim, lower), energy_of(rotation.dim, upper)};
      if (!any(~(is_ordinary(energy[0]) & is_ordinary(energy[1])))) {
        for (int half = 0; half < 2; ++half) length[half] = root(energy[half]);
        const Scale scale[2] = {{rotation.length, length[0]}, {rotation.length, length[1]}};
        rotate_both(rotation, rows, scale, lower, upper, scratch.rotated);
        return true;
      }
    }
  }
  return rotate_any<element>(rotation, rows, count, scratch, length);
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
