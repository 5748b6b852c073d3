// How many queries meet a tile that was decoded once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attend_kernels.h"

namespace fibkv {
namespace FIBKV_ISA {

// Up to so many queries per KV head, a sum across lanes for each is cheaper than to transpose a tile.
constexpr int kFewQueries = 8;

// Rows are [..][width] floats; `room` has room_floats(width, n) floats.
struct ManyKernels {
  size_t (*prepared_bytes)(int width, int n);
  void (*prepare)(const float* queries, int n, int width, uint8_t* prepared);
  size_t (*room_floats)(int width, int n);
  // logits[q * kTile + t] = <query q, row t>.
  void (*score)(const float* rows, int tokens, int width, const uint8_t* prepared, int n, float* logits, float* room);
  // out[q][...] += sum over t of weights[q * kTile + t] * row t.
  void (*mix)(const float* rows, int tokens, int width, const float* weights, int n, float* out, float* room);
};

// Products in float32.
extern const ManyKernels many_float32;
#ifdef FIBKV_BF16
// Queries, keys, weights and values rounded to bfloat16, as dense attention of such a model has them; sums in float32.
extern const ManyKernels many_bfloat16;
#endif

}  // namespace FIBKV_ISA
}  // namespace fibkv
