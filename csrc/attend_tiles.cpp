// Attention on one tile: what each codec is read by, integer kernels where the instruction set has them, else float
// kernels.
#include "attend_decode.h"
#include "attend_many.h"
#include "attend_rows.h"
#include "attend_softmax.h"
#include "isa.h"
#ifdef FIBKV_INTEGER
#include "integer_kernels.h"
#endif

namespace fibkv {
namespace FIBKV_ISA {
namespace {

struct Float32 {
  static constexpr int numbers = 1;
  static vi part(const float* from, int /*count*/) { return load<vi>(from); }
  static vi across(const float* from, int /*pitch*/, int /*rows*/) { return load<vi>(from); }
  static vf plus_products(vf sums, vi a, vi b) { return sums + as_float(a) * as_float(b); }
};

#ifdef FIBKV_INTEGER
template <Form queries>
bool on_integers(const Side& side, int n) {
  if (side.planes == 0 || side.order == Order::rows) return false;
  return n <= kIntegerQueries || (queries == Form::bf16 && integer_always(side));
}
#endif

// How many queries of a form meet decoded tiles.
template <Form queries>
const ManyKernels& many() {
#ifdef FIBKV_BF16
  if (queries == Form::bf16 && has_bf16()) return many_bfloat16;
#endif
  return many_float32;
}

size_t query_bytes(const Side& key, int n) { return static_cast<size_t>(n) * padded_dim(key.dim) * sizeof(float); }

template <Form queries>
size_t prepared_bytes(const Side& key, int n) {
#ifdef FIBKV_INTEGER
  // Means are met by the queries as they are.
  if (on_integers<queries>(key, n)) return integer_prepared_bytes(key, n) + (key.centered ? query_bytes(key, n) : 0);
#endif
  return n > kFewQueries ? many<queries>().prepared_bytes(padded_dim(key.dim), n) : query_bytes(key, n);
}

template <Form queries>
void prepare(const Side& key, const float* rows, int n, uint8_t* prepared) {
#ifdef FIBKV_INTEGER
  if (on_integers<queries>(key, n)) {
    integer_prepare(key, rows, n, prepared);
    if (key.centered) std::memcpy(prepared + integer_prepared_bytes(key, n), rows, query_bytes(key, n));
    return;
  }
#endif
  if (n > kFewQueries) return many<queries>().prepare(rows, n, padded_dim(key.dim), prepared);
  std::memcpy(prepared, rows, query_bytes(key, n));
}

size_t tile_floats(const Side& side) { return static_cast<size_t>(kTile) * padded_dim(side.dim); }

template <Form queries>
size_t scratch_floats(const Side& side, int n) {
  return tile_floats(side) + (n > kFewQueries ? many<queries>().room_floats(padded_dim(side.dim), n) : 0);
}

// numbers[q][t] *= factor of token t: logits by the keys' scales, weights by the values'.
void scale_tokens(const Side& side, const Span& span, int first, int tokens, int n, float* numbers) {
  float factors[kTile];
  factors_of(side, span, first, factors);
  for (int q = 0; q < n; ++q) {
    for (int t = 0; t < tokens; ++t) numbers[q * kTile + t] *= factors[t];
  }
}

#ifdef FIBKV_INTEGER
// products[q] = <query q, mean of the span>, of queries [n][padded_dim].
template <int n>
void meet_mean(const Side& key, const Span& span, const float* queries, float* products) {
  const uint8_t* numbers = reinterpret_cast<const uint8_t*>(span.mean + 1);
  const int width = padded_dim(key.dim);
  vf sums[n] = {};
  for (int i = 0; i < width; i += kLanes) {
    const vf mean = from_int8(load_part<vsb>(numbers, i, key.dim));
    for (int q = 0; q < n; ++q) sums[q] += mean * load<vf>(queries + static_cast<size_t>(q) * width + i);
  }
  const float power = power_of(span);
  for (int q = 0; q < n; ++q) products[q] = power * total(sums[q]);
}

// products [n] of all queries with the mean of a span, 0 where vectors have none.
void meet_means(const Side& key, const Span& span, const uint8_t* prepared, int n, float* products) {
  if (!key.centered) {
    for (int q = 0; q < n; ++q) products[q] = 0;
    return;
  }
  const float* queries = reinterpret_cast<const float*>(prepared + integer_prepared_bytes(key, n));
  const size_t width = padded_dim(key.dim);
  int q = 0;
  for (; q + 4 <= n; q += 4) meet_mean<4>(key, span, queries + q * width, products + q);
  for (; q < n; ++q) meet_mean<1>(key, span, queries + q * width, products + q);
}
#endif

template <Form queries>
void score(const Side& key, const Span& span, int first, int tokens, const uint8_t* prepared, int n, float* logits,
           float* scratch, const uint8_t* ahead) {
#ifdef FIBKV_INTEGER
  if (on_integers<queries>(key, n)) {
    float norms[kTile], shifts[kQueryBlock];
    factors_of(key, span, first, norms);
    meet_means(key, span, prepared, n, shifts);
    return integer_score(key, span, first, tokens, prepared, n, norms, shifts, logits, ahead);
  }
#endif
  const int width = padded_dim(key.dim);
  const float* few = reinterpret_cast<const float*>(prepared);
  const bool done = in_place(key, span, first, n, ahead, [&](const auto& rows) {
    score_rows(rows, width, tokens, few, n, logits);
  });
  if (done) {
    if (key.norm_bytes) scale_tokens(key, span, first, tokens, n, logits);
    return;
  }
  if (key.form == Form::klt && n <= kFewQueries) {
    prefetch_codes(key, first, tokens, ahead);
    score_pairs(key, span, first, tokens, few, n, width, kTile, logits);
    return scale_tokens(key, span, first, tokens, n, logits);
  }
  decode(key, span, first, tokens, scratch);
  float* room = scratch + tile_floats(key);
  if (n > kFewQueries) return many<queries>().score(scratch, tokens, width, prepared, n, logits, room);
  score_rows(Decoded{scratch, width}, width, tokens, few, n, logits);
}

template <Form queries>
void mix(const Side& value, const Span& span, int first, int tokens, float* weights, int n, float* out, float* scratch,
         const uint8_t* ahead) {
#ifdef FIBKV_INTEGER
  if (on_integers<queries>(value, n)) {
    float norms[kTile];
    factors_of(value, span, first, norms);
    return integer_mix(value, span, first, tokens, weights, n, norms, out, ahead);
  }
#endif
  const int width = padded_dim(value.dim);
  const bool done = in_place(value, span, first, n, ahead, [&](const auto& rows) {
    if (value.norm_bytes) scale_tokens(value, span, first, tokens, n, weights);
    mix_rows(rows, width, tokens, weights, n, out);
  });
  if (done) return;
  decode(value, span, first, tokens, scratch);
  float* room = scratch + tile_floats(value);
  if (n > kFewQueries) return many<queries>().mix(scratch, tokens, width, weights, n, out, room);
  mix_rows(Decoded{scratch, width}, width, tokens, weights, n, out);
}

template <Form queries>
void finish(const Side& value, const float* rows, int n, float* out) {
  const int width = padded_dim(value.dim);
#ifdef FIBKV_INTEGER
  if (on_integers<queries>(value, n)) {
    const int units = value.units();
    return with_planes(value.planes, [&](auto planes) {
      for (int q = 0; q < n; ++q, out += width, rows += width) {
        for (int unit = 0; unit < units; ++unit) {
          for (int plane = 0; plane < planes; ++plane) out[unit * planes + plane] += rows[plane * units + unit];
        }
      }
    });
  }
#endif
  for (int i = 0; i < n * width; ++i) out[i] += rows[i];
}

template <Form queries>
constexpr AttendKernels kernels_for = {prepared_bytes<queries>, prepare<queries>, score<queries>, soften, mix<queries>,
                                       finish<queries>, rotate, unrotate, scale, add_scaled, scratch_floats<queries>};

}  // namespace

const ManyKernels many_float32 = many_kernels<Float32>;

const AttendKernels f32_attend_kernels = kernels_for<Form::f32>;
const AttendKernels bf16_attend_kernels = kernels_for<Form::bf16>;

}  // namespace FIBKV_ISA
}  // namespace fibkv
