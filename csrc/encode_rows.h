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
  static void write(uint16_t* to, vf v) {
    const vu bits = (vu)v;
    store(to, low_halves((vi)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)));
  }
};

template <>
struct Format<Element::f16> {
  typedef uint16_t stored;
#if defined(__AVX512F__)
  static vf widen(vh v) { return (vf)_mm512_cvtph_ps((__m256i)v); }
#elif defined(__F16C__)
  static vf widen(vh v) { return (vf)_mm256_cvtph_ps((__m128i)v); }
#else
  static vf widen(vh v) { return from_f16(v); }
#endif
  static vf read(const uint16_t* from) { return widen(load<vh>(from)); }

  // What is decoded may lie a little above the largest float16: it becomes that, not infinity.
  static void write(uint16_t* to, vf v) {
    v = clamp(v, -65504.0f, 65504.0f);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    const vi bits = as_int(v);
    const vi magnitude = bits & splat(0x7FFFFFFF);
    const vi rounded = magnitude + splat(0xFFF) + ((magnitude >> 13) & splat(1));
    const vi normal = (rounded >> 13) - splat((127 - 15) << 10);
    // Below 2^-14 numbers are multiples of 2^-24, as float32 is at 0.5: an addition rounds to them.
    const vi denormal = as_int(as_float(magnitude) + splat(0.5f)) - as_int(splat(0.5f));
    const vi small = magnitude < splat((127 - 14) << 23);
    store(to, low_halves((small ? denormal : normal) | ((bits >> 16) & splat(0x8000))));
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
// row repeat the last one.
template <Element element, class Emit>
static inline void read_rows(const void* rows, int count, int dim, Emit emit) {
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  each_step(dim, [&](int first, int width) {
    vi tile[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane < count ? lane : count - 1;
      tile[lane] = as_int(read_lanes<element>(from + (int64_t)row * dim + first, width));
      // The rows of the next batch, as far as the second cache; behind the last one that does no harm.
      __builtin_prefetch(from + (int64_t)(lane + kLanes) * dim + first, 0, 2);
    }
    transpose(tile);
    if (width == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) emit(first + i, as_float(tile[i]));
    } else {
      for (int i = 0; i < width; ++i) emit(first + i, as_float(tile[i]));
    }
  });
}

// The way back: `vectors(i)` are the lanes of coordinate i.
template <Element element, class Vectors>
static inline void write_rows(void* rows, int count, int dim, Vectors vectors) {
  auto* to = static_cast<typename Format<element>::stored*>(rows);
  each_step(dim, [&](int first, int width) {
    vi tile[kLanes];
    for (int i = 0; i < kLanes; ++i) tile[i] = i < width ? as_int(vectors(first + i)) : vi{};
    transpose(tile);
    for (int lane = 0; lane < count; ++lane) {
      write_lanes<element>(to + (int64_t)lane * dim + first, as_float(tile[lane]), width);
    }
  });
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
