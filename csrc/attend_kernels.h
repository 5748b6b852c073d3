// The functions that each instruction set offers to attention. All work on tiles of at most kTile tokens of one head
// and on the queries that share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "side.h"

namespace fibkv {

constexpr int kTile = 64;

// Query and output rows are padded with zeros to a multiple of this many floats.
constexpr int kPad = 16;
constexpr int padded_dim(int dim) { return (dim + kPad - 1) / kPad * kPad; }

// Queries that meet a tile at most: enough to be worth decoding it for, few enough that what is summed up for them
// stays in the second-level cache.
constexpr int kQueryBlock = 512;

// Up to so many queries per KV head are scored on the codes themselves in integers, where the side allows that; and
// more if they are bfloat16, where that is faster. Float32 ones meet decoded tiles in float32.
constexpr int kIntegerQueries = 32;

// Which tokens of a tile a query sees: the first `limit`, and of those what the mask row (if any) allows.
struct Visibility {
  int limit;
  const uint8_t* allowed;  // [tokens] 0 or 1, or null
  const float* added;      // [tokens], added to the logits, or null
};

struct Softmax {
  float scale;
  float softcap;  // 0: none
};

// Running reference point and denominator of one query: weights are exp(logit - top), and `sums`, lane by lane, add up
// to their sum. `top` is the largest logit up to the last tile that exceeded it.
struct Running {
  float top;
  float sums[kPad];
};

struct AttendKernels {
  // Bytes that `prepare` fills for n queries.
  size_t (*prepared_bytes)(const Side& key, int n);
  // Turns queries [n][padded_dim] (in the keys' space) into what `score` reads.
  void (*prepare)(const Side& key, const float* queries, int n, uint8_t* prepared);
  // logits[q * kTile + t] = <query q, key of token first + t>, t < tokens. `ahead` is prefetched meanwhile.
  void (*score)(const Side& key, const Span& span, int first, int tokens, const uint8_t* prepared, int n, float* logits,
                float* scratch, const uint8_t* ahead);
  // Logits [n][kTile] to weights exp(logit - top) in place, padded with zeros; updates `running` [n]. shrink[q] is the
  // factor by which everything summed for query q before has to shrink. `bias` [n], or null, is added to the logits of
  // each query before anything else.
  void (*soften)(float* logits, int n, int tokens, const float* bias, const Softmax& softmax, const Visibility* visible,
                 Running* running, float* shrink);
  // out[q][...] += sum over t of weights[q * kTile + t] * value of token first + t. Weights are overwritten. `out` has
  // rows of padded_dim floats in the side's own order of coordinates: see `finish`.
  void (*mix)(const Side& value, const Span& span, int first, int tokens, float* weights, int n, float* out,
              float* scratch, const uint8_t* ahead);
  // Adds rows [n][padded_dim] in the side's own order to rows in natural order.
  void (*finish)(const Side& value, const float* rows, int n, float* out);
  // n rows [padded_dim] to the rotated space, and back.
  void (*rotate)(const Rotation& rotation, const float* x, int n, float* y);
  void (*unrotate)(const Rotation& rotation, const float* x, int n, float* y);
  // row *= factor.
  void (*scale)(float* row, int count, float factor);
  // sum += factor * row.
  void (*add_scaled)(float* sum, const float* row, int count, float factor);
  // Floats of scratch that `score` and `mix` need for n queries.
  size_t (*scratch_floats)(const Side& side, int n);
};

// For float32 queries, and for bfloat16 ones.
namespace portable {
extern const AttendKernels f32_attend_kernels, bf16_attend_kernels;
}
namespace avx2 {
extern const AttendKernels f32_attend_kernels, bf16_attend_kernels;
}
namespace avx512 {
extern const AttendKernels f32_attend_kernels, bf16_attend_kernels;
}

}  // namespace fibkv
