// Queries, and what they have seen: operands and sums of the matrix unit.
#pragma once

#include "pages.cuh"

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Eight queries of a head: columns of Q^T as float16 numbers of at most 1. What they were divided by goes to the logits.
struct Queries {
  u32 columns[STEPS][2];
  float factors[2], biases[2];

  // `first` of the queries of a matrix, `count` of them.
  __device__ __forceinline__ void read(const float* query, const float* bias, u64 matrix, int first, int count,
                                       float scale, int g, int c) {
    const int mine = first + g;
    const float4* const from = reinterpret_cast<const float4*>(query + (matrix * count + mine) * HEAD_DIM + c * (HEAD_DIM / 4));
    float4 numbers[STEPS];
    float peak = 0.0f;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      numbers[j] = mine < count ? from[j] : float4{0, 0, 0, 0};
      peak = fmaxf(peak, fmaxf(fmaxf(fabsf(numbers[j].x), fabsf(numbers[j].y)),
                               fmaxf(fabsf(numbers[j].z), fabsf(numbers[j].w))));
    }
    peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, 2));
    const float divisor = peak > 0.0f ? peak : 1.0f, inverse = 1.0f / divisor;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      columns[j][0] = halves(numbers[j].x * inverse, numbers[j].y * inverse);
      columns[j][1] = halves(numbers[j].z * inverse, numbers[j].w * inverse);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + 2 * c + i;
      factors[i] = __shfl_sync(ALL, divisor, (2 * c + i) * 4) * scale;
      biases[i] = bias != nullptr && column < count ? bias[matrix * count + column] * scale : 0.0f;
    }
  }
};

// What eight queries have seen so far.
struct Sums {
  float outputs[STEPS][4] = {};
  float peaks[2] = {-infinity(), -infinity()}, totals[2] = {};

  __device__ __forceinline__ void fade(float by) {
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) outputs[j][i] *= by;
  }
  // Measures logits from their greatest.
  __device__ __forceinline__ void rise(const float (&logits)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float peak = fmaxf(peaks[i], fmaxf(logits[i], logits[i + 2]));
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, apart));
      const float fading = peaks[i] == -infinity() ? 0.0f : power_of_two(peaks[i] - peak);
      peaks[i] = peak;
      totals[i] *= fading;
#pragma unroll
      for (int j = 0; j < STEPS; ++j) outputs[j][i] *= fading, outputs[j][i + 2] *= fading;
    }
  }
  // Weights of two tokens, times their values' norms: columns of P^T.
  __device__ __forceinline__ void weigh(u32 (&weights)[2], const float (&logits)[4], const float (&norms)[2]) {
    float powers[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Where nothing was seen yet the level is 0: exp(-inf) is 0, and no NaN.
      powers[i] = power_of_two(logits[i] - (MASK && peaks[i % 2] == -infinity() ? 0.0f : peaks[i % 2]));
      totals[i % 2] += powers[i];
    }
    weights[0] = transposed(halves(powers[0] * norms[0], powers[1] * norms[0]));
    weights[1] = transposed(halves(powers[2] * norms[1], powers[3] * norms[1]));
  }
};

// softcap * tanh(logit / softcap); beyond 15 tanh is 1 in float32.
__device__ __forceinline__ float bent(float logit, float softcap) {
  const float power = power_of_two(2.0f * LOG2E * fminf(fmaxf(logit / softcap, -15.0f), 15.0f));
  return softcap * (1.0f - 2.0f / (power + 1.0f));
}

// Adds up the warps' parts of eight queries, and writes them.
__device__ __forceinline__ void write(const Sums& sums, float norm, int warp, int lane, int first, int count, u64 into,
                                      float* out, float* lse) {
  // [WARPS, d / 8, 8 g and 8 queries, 1 of padding], where the tables were.
  extern __shared__ __align__(128) u8 shared[];
  float* const parts = reinterpret_cast<float*>(shared);
  constexpr int COUNT = HEAD_DIM / 8, APART = 65;
  __shared__ float peaks[WARPS][8], totals[WARPS][8];
  const int g = lane / 4, c = lane % 4;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sums.totals[i];
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2) total += __shfl_xor_sync(ALL, total, apart);
    if (g == 0) peaks[warp][2 * c + i] = sums.peaks[i], totals[warp][2 * c + i] = total;
  }
#pragma unroll
  for (int j = 0; j < STEPS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[(warp * COUNT + 2 * j + i / 2) * APART + g * 8 + 2 * c + i % 2] = sums.outputs[j][i] * norm;
  __syncthreads();
  for (int at = threadIdx.x; at < 8 * HEAD_DIM; at += blockDim.x) {
    const int mine = at / HEAD_DIM, axis = at % HEAD_DIM;
    if (first + mine >= count) continue;
    float peak = -infinity(), total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, peaks[w][mine]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float share = peaks[w][mine] == -infinity() ? 0.0f : power_of_two(peaks[w][mine] - peak);
      total = fmaf(totals[w][mine], share, total);
      sum = fmaf(parts[(w * COUNT + axis % COUNT) * APART + axis / COUNT * 8 + mine], share, sum);
    }
    const float divisor = total > 0.0f ? total : 1.0f;
    out[(into + first + mine) * HEAD_DIM + axis] = sum / divisor;
    if (axis == 0) lse[into + first + mine] = (peak + log2f(divisor)) / LOG2E;
  }
}
