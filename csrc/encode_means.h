// Means of groups of vectors, row by row, lanes are coordinates.
#pragma once

#include "encode_rows.h"

namespace fibkv {
namespace FIBKV_ISA {

// rows [tokens][dim] -> their mean [dim]; not finite where a row is not.
template <Element element>
static void mean_rows(const void* rows, int64_t tokens, int dim, double* mean) {
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  const vd count = splat_wide((double)tokens);
  each_step(dim, [&](int first, int width) {
    vd halves[2] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const vf v = read_lanes<element>(from + t * dim + first, width);
      halves[0] += widen_low(v);
      halves[1] += widen_high(v);
    }
    for (vd& half : halves) half = half / count;
    std::memcpy(mean + first, halves, width * sizeof(double));
  });
}

// rows [tokens][dim] - taken [dim] -> out [tokens][dim].
template <Element element>
static void subtract_from_rows(const void* rows, int64_t tokens, int dim, const float* taken, float* out) {
  const auto* from = static_cast<const typename Format<element>::stored*>(rows);
  for (int64_t t = 0; t < tokens; ++t, from += dim, out += dim) {
    each_step(dim, [&](int first, int width) {
      const vf mean = read_lanes<Element::f32>(taken + first, width);
      write_lanes<Element::f32>(out + first, read_lanes<element>(from + first, width) - mean, width);
    });
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
