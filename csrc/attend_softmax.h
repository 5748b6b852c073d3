// Logits of a tile to weights, with a running reference point.
#pragma once

#include "attend_kernels.h"
#include "vector.h"

namespace fibkv {
namespace FIBKV_ISA {

constexpr float kLowest = -__builtin_inff();

constexpr int kVectors = kTile / kLanes;

// Shifts, scales, caps and hides: logits [kTile] of one query as the softmax takes them.
static void shape_logits(float* logits, int tokens, float bias, const Softmax& softmax, const Visibility& visible) {
  for (int t = 0; t < kTile; t += kLanes) {
    vf x = (load<vf>(logits + t) + splat(bias)) * splat(softmax.scale);
    if (softmax.softcap > 0) x = splat(softmax.softcap) * tanhv(x * splat(1.0f / softmax.softcap));
    store(logits + t, x);
  }
  int limit = visible.limit < tokens ? visible.limit : tokens;
  limit = limit < 0 ? 0 : limit;
  if (visible.allowed) {
    for (int t = 0; t < limit; ++t) logits[t] = visible.allowed[t] ? logits[t] : kLowest;
  }
  if (visible.added) {
    for (int t = 0; t < limit; ++t) logits[t] += visible.added[t];
  }
  for (int t = limit; t < kTile; ++t) logits[t] = kLowest;
}

// Raises the reference point where logit * scale + offset exceeds it; returns the factor by which earlier sums shrink.
static float raise_top(const float* logits, float scale, float offset, Running& running) {
  vf most = load<vf>(logits) * splat(scale);
  for (int i = 1; i < kVectors; ++i) most = larger(most, load<vf>(logits + i * kLanes) * splat(scale));
  most += splat(offset);
  if (!any_above(most, splat(running.top))) return 1.0f;
  const float before = running.top;
  running.top = largest(most);
  const float shrink = expv(splat(before - running.top))[0];
  for (int i = 0; i < kPad; ++i) running.sums[i] *= shrink;
  return shrink;
}

// Most tiles of a padded row lie behind its padding: there a mask hides nothing.
static bool all_allowed(const uint8_t* allowed) {
  uint8_t all = 1;
  for (int t = 0; t < kTile; ++t) all &= allowed[t];
  return all;
}

static bool none_added(const float* added) {
  vi bits{};
  for (int t = 0; t < kTile; t += kLanes) bits |= load<vi>(added + t);
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= bits[i];
  return any == 0;
}

static bool sees_all(const Visibility& visible, int tokens) {
  return tokens == kTile && visible.limit >= kTile && (!visible.allowed || all_allowed(visible.allowed)) &&
         (!visible.added || none_added(visible.added));
}

static void soften(float* logits, int n, int tokens, const float* bias, const Softmax& softmax, const Visibility* visible,
            Running* running, float* shrink) {
  for (int q = 0; q < n; ++q) {
    float* row = logits + q * kTile;
    // Most tiles are whole, and scaled only: that is left to the exponential below.
    const bool plain = softmax.softcap == 0 && sees_all(visible[q], tokens);
    const float shift = bias ? bias[q] : 0.0f;
    if (!plain) shape_logits(row, tokens, shift, softmax, visible[q]);
    const float scale = plain ? softmax.scale : 1.0f, offset = plain ? softmax.scale * shift : 0.0f;
    shrink[q] = raise_top(row, scale, offset, running[q]);
    // A query that has seen nothing yet has no reference point: exp(-inf - 0) is 0.
    const vf top = splat(running[q].top == kLowest ? 0.0f : (running[q].top - offset) * kLog2e);
    const vf factor = splat(scale * kLog2e);
    vf sum = load<vf>(running[q].sums);
    for (int i = 0; i < kVectors; ++i) {
      const vf weight = exp2v(load<vf>(row + i * kLanes) * factor - top);
      store(row + i * kLanes, weight);
      sum += weight;
    }
    store(running[q].sums, sum);
  }
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
