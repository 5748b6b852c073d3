// Rows of vectors in memory as registers of one coordinate of kLanes rows, and back.
#pragma once

#include "encode.h"
#include "encode_lanes.h"

namespace fibkv {
namespace FIBKV_ISA {

// Elements of memory as float32 lanes, and back, rounded to the nearest (ties to even).
template <Element>
struct Format;

template <>
struct Format<Element::f32> {
  typedef float stored;
  static vf read(const float* from) { return load<vf>(from); }
  static void write(float* to, vf v) { store(to, v); }
  static vf lower(vi word) { return as_float(word); }
  static vf upper(vi word) { return as_float(word); }
  static vi join(vf v, vf /*the same*/) { return as_int(v); }
};

#if defined(__AVX512F__)
static inline vh low_halves(vi v) { return (vh)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
static inline vh low_halves(vi v) {
  const __m256i halves = _mm256_shuffle_epi8(
      (__m256i)v, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5, 8, 9, 12, 13,
                                   -1, -1, -1, -1, -1, -1, -1, -1));
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xD8));
}
#else
static inline vh low_halves(vi v) { return __builtin_convertvector((vu)v, vh); }
#endif

template <>
struct Format<Element::bf16> {
  typedef uint16_t stored;
  static vf read(const uint16_t* from) { return from_bf16(load<vh>(from)); }
  static void write(uint16_t* to, vf v) { store(to, low_halves((vi)(rounded(v) >> 16))); }
  static vf lower(vi word) { return as_float(word << 16); }
  static vf upper(vi word) { return as_float(word & splat((int)0xFFFF0000)); }
  static vi join(vf lower, vf upper) { return (vi)(rounded(lower) >> 16 | (rounded(upper) & 0xFFFF0000)); }

 private:
  // In the upper halves of lanes.
  static vu rounded(vf v) {
    const vu bits = (vu)v;
    return bits + 0x7FFF + ((bits >> 16) & 1);
  }
};

template <>
struct Format<Element::f16> {
  typedef uint16_t stored;
  static vf read(const uint16_t* from) { return from_f16(load<vh>(from)); }

  static void write(uint16_t* to, vf v) { store(to, rounded(v)); }
  static vf lower(vi word) { return from_f16(low_halves(word)); }
  static vf upper(vi word) { return from_f16(low_halves((vi)((vu)word >> 16))); }
  static vi join(vf lower, vf upper) {
    return FIBKV_ISA::widen(rounded(lower)) | FIBKV_ISA::widen(rounded(upper)) << 16;
  }

 private:
  // What is decoded may lie a little above the largest float16: it becomes that, not infinity.
  static vh rounded(vf v) {
    v = clamp(v, -65504.0f, 65504.0f);
#if defined(__AVX512F__)
    return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const vi bits = as_int(v);
    const vi magnitude = bits & splat(0x7FFFFFFF);
    const vi rounded = magnitude + splat(0xFFF) + ((magnitude >> 13) & splat(1));
    const vi normal = (rounded >> 13) - splat((127 - 15) << 10);
    // Below 2^-14 numbers are multiples of 2^-24, as float32 is at 0.5: an addition rounds to them.
    const vi denormal = as_int(as_float(magnitude) + splat(0.5f)) - as_int(splat(0.5f));
    const vi small = magnitude < splat((127 - 14) << 23);
    return low_halves((small ? denormal : normal) | ((bits >> 16) & splat(0x8000)));
#endif
  }
};

// The first `width` lanes from and to memory; the others read as zero.
template <Element element>
static inline vf read_lanes(const typename Format<element>::stored* from, int width) {
  if (width == kLanes) return Format<element>::read(from);
  typename Format<element>::stored buffer[kLanes] = {};
  std::memcpy(buffer, from, width * sizeof *buffer);
  return Format<element>::read(buffer);
}

template <Element element>
static inline void write_lanes(typename Format<element>::stored* to, vf v, int width) {
  if (width == kLanes) return Format<element>::write(to, v);
  typename Format<element>::stored buffer[kLanes];
  Format<element>::write(buffer, v);
  std::memcpy(to, buffer, width * sizeof *buffer);
}

// Calls body(first, width) for the coordinates in steps of kLanes.
template <class Body>
static inline void each_step(int dim, Body body) {
  for (int first = 0; first < dim; first += kLanes) body(first, dim - first < kLanes ? dim - first : kLanes);
}

// Reads up to kLanes rows [count][dim] and hands on each coordinate: emit(i, lanes of coordinate i). Lanes without a
// row repeat the last one. What is transposed are words of 32 bits, in which two coordinates of 16 bits stay together.
template <Element element, class Emit>
static inline void read_rows(const void* rows, int count, int dim, Emit emit) {
  typedef Format<element> Form;
  typedef typename Form::stored stored;
  constexpr int in_word = 4 / sizeof(stored), most = in_word * kLanes;
  const auto* from = static_cast<const stored*>(rows);
  for (int first = 0; first < dim; first += most) {
    const int width = dim - first < most ? dim - first : most;
    vi tile[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane < count ? lane : count - 1;
      tile[lane] = load_some<vi>(from + (int64_t)row * dim + first, width * sizeof(stored));
      // The rows of the next batch, as far as the second cache; behind the last one that does no harm.
      __builtin_prefetch(from + (int64_t)(lane + kLanes) * dim + first, 0, 2);
    }
    transpose(tile);
    const auto hand_on = [&](int i) {
      emit(first + i, i % in_word ? Form::upper(tile[i / in_word]) : Form::lower(tile[i / in_word]));
    };
    if (width == most) {
#pragma GCC unroll 32
      for (int i = 0; i < most; ++i) hand_on(i);
    } else {
      for (int i = 0; i < width; ++i) hand_on(i);
    }
  }
}

// The way back: `vectors(i)` are the lanes of coordinate i.
template <Element element, class Vectors>
static inline void write_rows(void* rows, int count, int dim, Vectors vectors) {
  typedef Format<element> Form;
  typedef typename Form::stored stored;
  constexpr int in_word = 4 / sizeof(stored), most = in_word * kLanes;
  auto* to = static_cast<stored*>(rows);
  for (int first = 0; first < dim; first += most) {
    const int width = dim - first < most ? dim - first : most;
    const auto coordinate = [&](int i) { return i < width ? vectors(first + i) : vf{}; };
    vi tile[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = Form::join(coordinate(in_word * i), coordinate(in_word * i + in_word - 1));
    }
    transpose(tile);
    for (int lane = 0; lane < count; ++lane) {
      store_some(to + (int64_t)lane * dim + first, tile[lane], width * sizeof(stored));
    }
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
