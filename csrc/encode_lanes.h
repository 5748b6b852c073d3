// What encoding does with the registers of an instruction set, beside what vector.h has: float64 lanes, half as many to
// a register, gathers of pairs.
#pragma once

#include "transpose.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

typedef double vd __attribute__((vector_size(4 * kLanes)));
constexpr int kHalf = kLanes / 2;

static inline vd splat_wide(double x) { return x - vd{}; }

// Hands out working memory by registers.
class Room {
 public:
  explicit Room(void* memory) : next_(static_cast<vf*>(memory)) {}

  template <class V>
  void take(int count, V*& taken) {
    static_assert(sizeof(V) == sizeof(vf));
    taken = reinterpret_cast<V*>(next_);
    next_ += count;
  }

 private:
  vf* next_;
};

// Float64 of each lane.
struct Wide {
  vd low{}, high{};
};

// The lower and the upper half of float32 lanes as float64, and back.
#if defined(__AVX512F__)
static inline vd widen_low(vf v) { return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
static inline vd widen_high(vf v) { return (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
static inline vf narrow(vd low, vd high) {
  const __m256 a = _mm512_cvtpd_ps((__m512d)low), b = _mm512_cvtpd_ps((__m512d)high);
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
}
#elif defined(__AVX2__)
static inline vd widen_low(vf v) { return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
static inline vd widen_high(vf v) { return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
static inline vf narrow(vd low, vd high) {
  const __m128 a = _mm256_cvtpd_ps((__m256d)low), b = _mm256_cvtpd_ps((__m256d)high);
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1);
}
#else
static inline vd widen_low(vf v) { return vd{v[0], v[1]}; }
static inline vd widen_high(vf v) { return vd{v[2], v[3]}; }
static inline vf narrow(vd low, vd high) {
  return vf{(float)low[0], (float)low[1], (float)high[0], (float)high[1]};
}
#endif

// a * b + c, in one rounding where the instruction set has that.
#if defined(__AVX512F__)
static inline vf multiply_add(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vd multiply_add(vd a, vd b, vd c) { return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif defined(__FMA__)
static inline vf multiply_add(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vd multiply_add(vd a, vd b, vd c) { return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
static inline vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
static inline vd multiply_add(vd a, vd b, vd c) { return a * b + c; }
#endif

// a - b, as a multiply-add where there is one: in other units than additions, where a processor has units for those.
#if defined(__AVX512F__)
static inline vf subtract_as_product(vf a, vf b) {
  return (vf)_mm512_fnmadd_ps((__m512)splat(1.0f), (__m512)b, (__m512)a);
}
static inline vd subtract_as_product(vd a, vd b) {
  return (vd)_mm512_fnmadd_pd((__m512d)splat_wide(1.0), (__m512d)b, (__m512d)a);
}
#elif defined(__FMA__)
static inline vf subtract_as_product(vf a, vf b) {
  return (vf)_mm256_fnmadd_ps((__m256)splat(1.0f), (__m256)b, (__m256)a);
}
static inline vd subtract_as_product(vd a, vd b) {
  return (vd)_mm256_fnmadd_pd((__m256d)splat_wide(1.0), (__m256d)b, (__m256d)a);
}
#else
static inline vf subtract_as_product(vf a, vf b) { return a - b; }
static inline vd subtract_as_product(vd a, vd b) { return a - b; }
#endif

#if defined(__AVX512F__)
static inline vd square_root(vd v) { return (vd)_mm512_sqrt_pd((__m512d)v); }
#elif defined(__AVX2__)
static inline vd square_root(vd v) { return (vd)_mm256_sqrt_pd((__m256d)v); }
#else
static inline vd square_root(vd v) { return vd{__builtin_sqrt(v[0]), __builtin_sqrt(v[1])}; }
#endif

static inline vi truncated(vf v) { return __builtin_convertvector(v, vi); }
static inline vf as_numbers(vi v) { return __builtin_convertvector(v, vf); }

// The nearest integer, ties to even, for |v| <= 2^22: adding 1.5 * 2^23 rounds to one.
static inline vi nearest(vf v) {
  const vf magic = splat(12582912.0f);
  return as_int(v + magic) - as_int(magic);
}

static inline vf magnitude(vf v) { return as_float(as_int(v) & splat(INT32_MAX)); }

#if defined(__AVX512F__)
static inline vb low_bytes(vi v) { return (vb)_mm512_cvtepi32_epi8((__m512i)v); }
#else
static inline vb low_bytes(vi v) { return __builtin_convertvector((vu)v, vb); }
#endif

// One instruction each, which GCC does not find in a comparison and a choice.
#if defined(__AVX512F__)
static inline vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vi minimum(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
static inline vi maximum(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
static inline vf minimum(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf maximum(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vi minimum(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
static inline vi maximum(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
static inline vf minimum(vf a, vf b) { return a < b ? a : b; }
static inline vf maximum(vf a, vf b) { return a > b ? a : b; }
static inline vi minimum(vi a, vi b) { return a < b ? a : b; }
static inline vi maximum(vi a, vi b) { return a > b ? a : b; }
#endif

static inline vi clamp(vi v, int low, int high) { return minimum(maximum(v, splat(low)), splat(high)); }
static inline vf clamp(vf v, float low, float high) { return minimum(maximum(v, splat(low)), splat(high)); }

// One register or the other, lane by lane.
static inline vi choose(vi mask, vi chosen, vi otherwise) { return mask ? chosen : otherwise; }
static inline vf choose(vi mask, vf chosen, vf otherwise) { return mask ? chosen : otherwise; }

#if defined(__AVX512F__)
static inline bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
#elif defined(__AVX2__)
static inline bool any(vi mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }
#else
static inline bool any(vi mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
#endif

// Pairs of neighbours, table[2 index] and table[2 index + 1] of each lane.
#if defined(__AVX512F__)
static inline void gather_pairs(const float* table, vi index, vf& first, vf& second) {
  const __m512i i = (__m512i)index;
  const __m512 low = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_castsi512_si256(i), table, 8));
  const __m512 high = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_extracti32x8_epi32(i, 1), table, 8));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  first = (vf)_mm512_permutex2var_ps(low, even, high);
  second = (vf)_mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}
#elif defined(__AVX2__)
static inline void gather_pairs(const float* table, vi index, vf& first, vf& second) {
  const __m256i i = (__m256i)index;
  const double* pairs = (const double*)table;
  const __m256 low = _mm256_castpd_ps(_mm256_i32gather_pd(pairs, _mm256_castsi256_si128(i), 8));
  const __m256 high = _mm256_castpd_ps(_mm256_i32gather_pd(pairs, _mm256_extracti128_si256(i, 1), 8));
  const __m256d x = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
  const __m256d y = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xDD));
  first = (vf)_mm256_permute4x64_pd(x, 0xD8);
  second = (vf)_mm256_permute4x64_pd(y, 0xD8);
}
#else
static inline void gather_pairs(const float* table, vi index, vf& first, vf& second) {
  for (int i = 0; i < kLanes; ++i) {
    first[i] = table[2 * index[i]];
    second[i] = table[2 * index[i] + 1];
  }
}
#endif

// A register of parts of 128 bits.
typedef int32_t vi4 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
static inline vi join(const vi4* part) {
  const __m256i low = _mm256_set_m128i((__m128i)part[1], (__m128i)part[0]);
  return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_set_m128i((__m128i)part[3], (__m128i)part[2]), 1);
}
#elif defined(__AVX2__)
static inline vi join(const vi4* part) { return (vi)_mm256_set_m128i((__m128i)part[1], (__m128i)part[0]); }
#else
static inline vi join(const vi4* part) { return part[0]; }
#endif

// As `gather`, of indices that lie in memory, not just written: element by element, in half the time on Zen 4, whose
// gathers are slow.
static inline vi gather_each(const void* table, const vi* indices) {
  const auto* from = static_cast<const int32_t*>(table);
  vi4 part[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    uint64_t pair[2];
    std::memcpy(pair, (const char*)indices + 16 * i, sizeof pair);
    part[i] = vi4{from[(uint32_t)pair[0]], from[pair[0] >> 32], from[(uint32_t)pair[1]], from[pair[1] >> 32]};
  }
  return join(part);
}

// Pairs of neighbours, table[2 index] and table[2 index + 1] of each lane, likewise.
static inline void gather_each_pair(const float* table, const vi* indices, vf& first, vf& second) {
  typedef int64_t pairs __attribute__((vector_size(16)));
  vi4 part[2][kLanes / 4];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    uint32_t at[2];
    std::memcpy(at, (const char*)indices + 8 * i, sizeof at);
    part[i % 2][i / 2] = (vi4)pairs{load<int64_t>(table + 2 * (size_t)at[0]), load<int64_t>(table + 2 * (size_t)at[1])};
  }
  const vi a = join(part[0]), b = join(part[1]);
#if defined(__AVX512F__)
  first = (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
  second = (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD);
#elif defined(__AVX2__)
  first = (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  second = (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD);
#else
  first = (vf)pick<0, 2, 4, 6>(a, b);
  second = (vf)pick<1, 3, 5, 7>(a, b);
#endif
}

// Four neighbours each: found[i] has table[stride index + i] of each lane.
static inline void gather_fours(const float* table, int stride, const vi* indices, vi* found) {
  const auto four_of = [&](int lane) {
    int32_t index;
    std::memcpy(&index, (const char*)indices + 4 * lane, sizeof index);
    return load<vi4>(table + (int64_t)stride * index);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    vi4 part[kLanes / 4];
#pragma GCC unroll 4
    for (int j = 0; j < kLanes / 4; ++j) part[j] = four_of(4 * j + i);
    found[i] = join(part);
  }
  transpose_four(found);
}

// The first `nbytes` of a register, from and to memory; the rest of what is read is zero.
template <class V>
static inline V load_some(const void* from, int nbytes) {
  if (nbytes == (int)sizeof(V)) return load<V>(from);
#if defined(__AVX512BW__)
  // Reads no byte behind them.
  if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_epi8(~0ull >> (64 - nbytes), from);
#endif
  V v{};
  std::memcpy(&v, from, nbytes);
  return v;
}

template <class V>
static inline void store_some(void* to, V v, int nbytes) {
  if (nbytes == (int)sizeof(V)) {
    store(to, v);
  } else {
    std::memcpy(to, &v, nbytes);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
