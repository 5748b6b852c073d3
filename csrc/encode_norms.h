// Norms of a group as 8-bit logarithms (log_norms.h), and back.
#pragma once

#include "encode_rows.h"
#include "log_norms.h"

namespace fibkv {
namespace FIBKV_ISA {

// Up to kLanes norms; lanes behind the last one are 0.
static inline Wide load_norms(const double* norms, int64_t count) {
  if (count >= kLanes) return {load<vd>(norms), load<vd>(norms + kHalf)};
  double some[kLanes] = {};
  std::memcpy(some, norms, count * sizeof(double));
  return {load<vd>(some), load<vd>(some + kHalf)};
}

// The least of the norms that are not 0, infinity where there is none, and the most.
static void find_extremes(const double* norms, int64_t tokens, double* least, double* most) {
  const vd none = splat_wide(__builtin_inf());
  vd low = none, high{};
  const auto take = [&](vd v) {
    const vd positive = v > vd{} ? v : none;
    low = positive < low ? positive : low;
    high = v > high ? v : high;
  };
  for (int64_t first = 0; first < tokens; first += kLanes) {
    const Wide lanes = load_norms(norms + first, tokens - first);
    take(lanes.low);
    take(lanes.high);
  }
  *least = low[0];
  *most = high[0];
  for (int i = 1; i < kHalf; ++i) {
    if (low[i] < *least) *least = low[i];
    if (high[i] > *most) *most = high[i];
  }
}

// log2(x) - offset of normal numbers: within 3e-7, and 2^-23 of itself, where exponents less the offset are exact.
static inline vf log2_above(vf x, vf offset) {
  // x = 2^exponent m, with m between sqrt(1/2) and sqrt(2).
  const vi root = splat(0x3F3504F3), bits = as_int(x) - root;
  const vf exponent = as_numbers(bits >> 23);
  const vf m = as_float((bits & splat(0x7FFFFF)) + root);
  // ln m = 2 artanh((m - 1) / (m + 1)), whose argument is below .172: what the series leaves out is below 5e-8.
  const vf s = (m - splat(1.0f)) / (m + splat(1.0f)), square = s * s;
  const vf series = ((splat(1 / 7.0f) * square + splat(1 / 5.0f)) * square + splat(1 / 3.0f)) * square + splat(1.0f);
  return (exponent - offset) + splat(2 * kLog2e) * s * series;
}

// norms [tokens] >= 0 -> codes [tokens], and range [2] as float16. False: a norm is beyond float32.
static bool encode_norms(const double* norms, int64_t tokens, uint8_t* codes, uint16_t* range) {
  double least, most;
  find_extremes(norms, tokens, &least, &most);
  const LogRange logs = log_range(least, most);
  const vf low = splat((float)logs.low), steps = splat((float)(1 / logs.step));
  write_lanes<Element::f16>(range, vf{(float)logs.low, (float)logs.step}, 2);
  for (int64_t first = 0; first < tokens; first += kLanes) {
    const int width = tokens - first < kLanes ? (int)(tokens - first) : kLanes;
    const Wide lanes = load_norms(norms + first, width);
    const vf x = narrow(lanes.low, lanes.high);
    const vf place = log2_above(x, low) * steps;
    const vi step = nearest(place);
    vi code = clamp(step, 0, kLogSteps) + splat(1);
    // In steps of 2^-10 or more the error is below 5e-4. Where that could decide, and of numbers that are not normal,
    // the exact logarithm does.
    const vf off = magnitude(place - as_numbers(step));
    const vi unsure = (off > splat(0.5f - 0x1p-10f)) | (x < splat(0x1p-126f));
    if (any(unsure)) {
      for (int lane = 0; lane < width; ++lane) {
        if (unsure[lane]) code[lane] = log_norm(norms[first + lane], logs);
      }
    }
    store_some(codes + first, low_bytes(code), width);
  }
  return most <= __FLT_MAX__;
}

// The way back.
static void decode_norms(const uint8_t* codes, const uint16_t* range, int64_t tokens, float* norms) {
  const vf logs = read_lanes<Element::f16>(range, 2), low = splat(logs[0]), step = splat(logs[1]);
  for (int64_t first = 0; first < tokens; first += kLanes) {
    const int width = tokens - first < kLanes ? (int)(tokens - first) : kLanes;
    const vi code = widen(load_some<vb>(codes + first, width));
    const vf log = low + as_numbers(code - splat(1)) * step;
    // exp2v knows no denormal numbers.
    const vi tiny = log < splat(-64.0f);
    const vf norm = exp2v(log + choose(tiny, splat(64.0f), vf{})) * choose(tiny, splat(0x1p-64f), splat(1.0f));
    write_lanes<Element::f32>(norms + first, choose(code == vi{}, vf{}, norm), width);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
