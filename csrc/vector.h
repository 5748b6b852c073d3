// Vectors of the instruction set that a file is compiled for, by the compiler's vector extensions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fibkv {
namespace FIBKV_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));
typedef int8_t vsb __attribute__((vector_size(kLanes)));

template <typename V>
static inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
static inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Narrow integers to 32 bits. Spelled out, because GCC takes __builtin_convertvector apart element by element here.
#if defined(__AVX512F__)
static inline vi widen(vb v) { return (vi)_mm512_cvtepu8_epi32((__m128i)v); }
static inline vi widen(vsb v) { return (vi)_mm512_cvtepi8_epi32((__m128i)v); }
static inline vi widen(vh v) { return (vi)_mm512_cvtepu16_epi32((__m256i)v); }
#elif defined(__AVX2__)
static inline vi widen(vb v) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&v)); }
static inline vi widen(vsb v) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&v)); }
static inline vi widen(vh v) { return (vi)_mm256_cvtepu16_epi32((__m128i)v); }
#else
static inline vi widen(vb v) { return __builtin_convertvector(v, vi); }
static inline vi widen(vsb v) { return __builtin_convertvector(v, vi); }
static inline vi widen(vh v) { return __builtin_convertvector(v, vi); }
#endif

static inline vf splat(float x) { return x - vf{}; }
static inline vi splat(int32_t x) { return x - vi{}; }

static inline vf as_float(vi v) { return (vf)v; }
static inline vi as_int(vf v) { return (vi)v; }
static inline vf larger(vf a, vf b) { return a > b ? a : b; }

// What takes a vector across its lanes has instructions of its own.
#if defined(__AVX512F__)
static inline float total(vf v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float largest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
static inline bool any_above(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0; }
#else
static inline float total(vf v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
static inline float largest(vf v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}
static inline bool any_above(vf a, vf b) {
#if defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  // Lane by lane: the difference of two infinities is no number.
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= a[i] > b[i];
  return any;
#endif
}
#endif

// Lanes of a and b, which are counted on from a's to b's. Compilers differ in how they are told.
template <int... at, class V>
static inline V pick(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, at...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){at...});
#endif
}

// Of two vectors, sums of lanes that are neighbours.
template <int... i>
static inline vf add_neighbours(vf a, vf b, std::integer_sequence<int, i...>) {
  return pick<2 * i...>(a, b) + pick<2 * i + 1 ...>(a, b);
}

// Lane i of the result is the sum of all lanes of v[i].
static inline vf totals(const vf* v) {
  vf sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = v[i];
  // Each pass adds neighbours, and puts two vectors' halves into one.
  for (int count = kLanes; count > 1; count /= 2) {
    for (int i = 0; i < count / 2; ++i) {
      sums[i] = add_neighbours(sums[2 * i], sums[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
    }
  }
  return sums[0];
}

// 2^x for x <= 127; far below -126, and of -infinity, it is 0. Relative error below 2e-7.
static inline vf exp2v(vf x) {
#if defined(__AVX512F__)
  const vf whole = (vf)_mm512_roundscale_ps((__m512)x, 0);
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0);  // of -infinity 0
#else
  const vi tiny = x < splat(-126.0f);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);  // -0.5 .. 0.5
#endif
  vf p = splat(1.326472707e-3f);  // minimax polynomial of 2^f on [-0.5, 0.5]
  p = p * f + splat(9.671512649e-3f);
  p = p * f + splat(5.550733744e-2f);
  p = p * f + splat(2.402224209e-1f);
  p = p * f + splat(6.931469776e-1f);
  p = p * f + splat(1.0f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  // The integer stands in the lowest bits of the mantissa.
  return tiny ? splat(0.0f) : as_float(as_int(p) + (as_int(shifted) << 23));
#endif
}

constexpr float kLog2e = 1.44269504088896f;

// exp(x) for x <= 88.
static inline vf expv(vf x) { return exp2v(x * splat(kLog2e)); }

// tanh(x) = 1 - 2 / (exp(2 |x|) + 1), with the sign of x; exact to about 1e-7 of 1.
static inline vf tanhv(vf x) {
  const vi sign = as_int(x) & splat(INT32_MIN);
  const vf magnitude = as_float(as_int(x) ^ sign);
  const vf bounded = magnitude > splat(20.0f) ? splat(20.0f) : magnitude;
  const vf t = splat(1.0f) - splat(2.0f) / (expv(bounded * splat(2.0f)) + splat(1.0f));
  return as_float(as_int(t) ^ sign);
}

static inline vf from_bf16(vh bits) { return as_float(widen(bits) << 16); }

// Small floats (sign, `exponent` bits, `mantissa` bits) in the low bits of each lane: normal and denormal numbers,
// whatever the processor does with float32 denormals.
template <int exponent, int mantissa>
static inline vf from_small(vi bits) {
  constexpr int bias = (1 << (exponent - 1)) - 1;
  const vi sign = (bits >> (exponent + mantissa)) << 31;
  const vi magnitude = bits & splat((1 << (exponent + mantissa)) - 1);
  const vi raised = (magnitude << (23 - mantissa)) + splat((127 - bias) << 23);
  // With exponent 0, the value is mantissa * 2^(1 - bias - mantissa bits): read it one exponent up, take that off.
  const vf least = as_float(splat((127 - bias + 1) << 23));
  const vf denormal = as_float(raised + splat(1 << 23)) - least;
  const vf value = magnitude < splat(1 << mantissa) ? denormal : as_float(raised);
  return as_float(as_int(value) | sign);
}

#if defined(__AVX512F__)
static inline vf from_f16(vh halves) { return (vf)_mm512_cvtph_ps((__m256i)halves); }
#elif defined(__F16C__)
static inline vf from_f16(vh halves) { return (vf)_mm256_cvtph_ps((__m128i)halves); }
#else
static inline vf from_f16(vh halves) {
  const vi bits = widen(halves);
  const vi special = (bits & splat(0x7C00)) == splat(0x7C00);  // infinite or NaN
  const vi wide = ((bits & splat(0x8000)) << 16) | splat(0x7F800000) | ((bits & splat(0x3FF)) << 13);
  return special ? as_float(wide) : from_small<5, 10>(bits);
}
#endif

#if defined(__F16C__)
// As float16, whose exponents are eight less. Denormal numbers of float16 are converted, whatever the processor does
// with those of float32.
static inline vf from_e4m3(vb codes) {
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepi8_epi16((__m128i)codes);
  const vh halves = (vh)_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xBFFF)));
#else
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)&codes));
  const vh halves = (vh)_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xBFFF)));
#endif
  return from_f16(halves) * splat(256.0f);
}
#else
static inline vf from_e4m3(vb codes) { return from_small<4, 3>(widen(codes)); }
#endif

// table[index] of each lane, elements of four bytes.
#if defined(__AVX512F__)
static inline vi gather(const void* table, vi index) { return (vi)_mm512_i32gather_epi32((__m512i)index, table, 4); }
// Four bytes from a byte address each.
static inline vi gather_bytes(const void* table, vi index) {
  return (vi)_mm512_i32gather_epi32((__m512i)index, table, 1);
}
#elif defined(__AVX2__)
static inline vi gather(const void* table, vi index) {
  return (vi)_mm256_i32gather_epi32((const int*)table, (__m256i)index, 4);
}
static inline vi gather_bytes(const void* table, vi index) {
  return (vi)_mm256_i32gather_epi32((const int*)table, (__m256i)index, 1);
}
#else
static inline vi gather(const void* table, vi index) {
  vi found{};
  for (int i = 0; i < kLanes; ++i) std::memcpy((char*)&found + 4 * i, (const char*)table + 4 * (int64_t)index[i], 4);
  return found;
}
static inline vi gather_bytes(const void* table, vi index) {
  vi found{};
  for (int i = 0; i < kLanes; ++i) std::memcpy((char*)&found + 4 * i, (const char*)table + index[i], 4);
  return found;
}
#endif

}  // namespace FIBKV_ISA
}  // namespace fibkv
