// Eight-bit numbers with one scale per vector, and scales per channel: row by row, lanes are coordinates.
#pragma once

#include "encode_rows.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline vi not_finite(vf v) { return as_int(magnitude(v)) >= splat(0x7F800000); }

// float32 >= 0 to bfloat16 towards +infinity, in the low half of a lane; what is finite stays so.
static inline vi raised_bf16(vf positive) {
  return minimum((vi)(((vu)as_int(positive) + 0xFFFF) >> 16), splat(0x7F7F));
}

static inline vf from_bf16_bits(vi bits) { return as_float(bits << 16); }

static inline vf one_for_zero(vf v) { return v == splat(0.0f) ? splat(1.0f) : v; }

// |v| <= 127 to integers: the nearest, ties to even.
struct Int8 {
  static constexpr float limit = 127.0f;
  static vi encode(vf v) { return nearest(v); }
  static vf decode(vb codes) { return as_numbers(widen((vsb)codes)); }
};

// |v| <= 448 to float8 e4m3: the nearest, ties to even.
struct E4m3 {
  static constexpr float limit = 448.0f;
  static vi encode(vf v) {
    const vi bits = as_int(magnitude(v));
    const vi normal = ((bits + splat(0x7FFFF) + ((bits >> 20) & splat(1))) >> 20) - splat((127 - 7) << 3);
    // Below 2^-6 numbers are multiples of 2^-9, as float32 is at 2^14: an addition rounds to them.
    const vf magic = splat(16384.0f);
    const vi denormal = as_int(magnitude(v) + magic) - as_int(magic);
    const vi code = bits < splat((127 - 6) << 23) ? denormal : normal;
    return code | (vi)(((vu)as_int(v) >> 24) & 0x80);
  }
  static vf decode(vb codes) { return from_e4m3(codes); }
};

template <class Number, Element element>
static bool encode_scaled_rows(const void* rows, int64_t count, int dim, uint8_t* values, uint16_t* scales) {
  const auto* row = static_cast<const typename Format<element>::stored*>(rows);
  vi bad{};
  for (int64_t i = 0; i < count; ++i, row += dim, values += dim) {
    vf peaks{};
    each_step(dim, [&](int first, int width) {
      const vf v = read_lanes<element>(row + first, width);
      bad |= not_finite(v);
      peaks = maximum(magnitude(v), peaks);
    });
    const vi scale = raised_bf16(splat(largest(peaks)) / splat(Number::limit));
    scales[i] = (uint16_t)scale[0];
    const vf divisor = one_for_zero(from_bf16_bits(scale));
    each_step(dim, [&](int first, int width) {
      const vf v = read_lanes<element>(row + first, width) / divisor;
      store_some(values + first, low_bytes(Number::encode(clamp(v, -Number::limit, Number::limit))), width);
    });
  }
  return !any(bad);
}

template <class Number, Element element>
static void decode_scaled_rows(const uint8_t* values, const uint16_t* scales, int64_t count, int dim, void* out) {
  auto* row = static_cast<typename Format<element>::stored*>(out);
  for (int64_t i = 0; i < count; ++i, row += dim, values += dim) {
    const vf scale = from_bf16_bits(splat(scales[i]));
    each_step(dim, [&](int first, int width) {
      write_lanes<element>(row + first, Number::decode(load_some<vb>(values + first, width)) * scale, width);
    });
  }
}

// The scale of a channel is its root mean square over the tokens, rounded up to bfloat16. The peak is divided out
// first, as the reference does: its float32 quotients decide the last bits.
template <Element element>
static bool divide_channels(const void* rows, int64_t tokens, int dim, uint16_t* scales, float* divided) {
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  vi bad{};
  each_step(dim, [&](int first, int width) {
    const auto channels = [&](int64_t token) { return read_lanes<element>(from + token * dim + first, width); };
    vf peak{};
    for (int64_t t = 0; t < tokens; ++t) {
      const vf v = channels(t);
      bad |= not_finite(v);
      peak = maximum(magnitude(v), peak);
    }
    const vf unit = one_for_zero(peak);
    vd low{}, high{};
    for (int64_t t = 0; t < tokens; ++t) {
      const vf v = channels(t) / unit;
      low = multiply_add(widen_low(v), widen_low(v), low);
      high = multiply_add(widen_high(v), widen_high(v), high);
    }
    const vd mean_low = low / splat_wide((double)tokens), mean_high = high / splat_wide((double)tokens);
    const vf spread = narrow(widen_low(peak) * square_root(mean_low), widen_high(peak) * square_root(mean_high));
    const vi scale = raised_bf16(spread);
    for (int i = 0; i < width; ++i) scales[first + i] = (uint16_t)scale[i];
    const vf divisor = one_for_zero(from_bf16_bits(scale));
    for (int64_t t = 0; t < tokens; ++t) {
      write_lanes<Element::f32>(divided + t * dim + first, channels(t) / divisor, width);
    }
  });
  return !any(bad);
}

template <Element element>
static void multiply_channels(const float* rows, const uint16_t* scales, int64_t tokens, int dim, void* out) {
  auto* row = static_cast<typename Format<element>::stored*>(out);
  for (int64_t t = 0; t < tokens; ++t, rows += dim, row += dim) {
    each_step(dim, [&](int first, int width) {
      const vf scale = read_lanes<Element::bf16>(scales + first, width);
      write_lanes<element>(row + first, read_lanes<Element::f32>(rows + first, width) * scale, width);
    });
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
