// Attention of a few queries on pages of codes, split over the context: CUDA C++ beside `attend_splits` in
// triton_attend.py, whose arguments and meaning it has.
//
// Why not Triton: a look-up needs a table in shared memory that stays there while a program runs, with a copy for each
// bank, so that no lane waits for another; see docs/PERFORMANCE.md.
//
// A warp takes units of 64 tokens, in tiles of 16, as rows of matrices: S^T = K Q^T and O^T = V^T P^T by m16n8k16. Two
// coordinates of a key are one operand register as they come out of the table. Operands of V are pairs along tokens: two
// look-ups, two byte permutes. Lanes are named as in PTX: g = lane / 4, c = lane % 4.
//   K: lane (g, c) holds coordinates c * d/4 .. of tokens g and g + 8: d/16 steps of 4 coordinates.
//   V: lane (g, c) holds coordinates g * d/8 .. of tokens 2c, 2c + 1, 2c + 8, 2c + 9: d/16 rows of 2 coordinates.
//   Logits and sums: lane (g, c) holds queries 2c and 2c + 1.
// Codes of the next tile are loaded as soon as those of the last one are used up: no second set of registers.
//
// Constants, given by the compiler's command line:
//   HEAD_DIM                           d, a multiple of 32
//   KEY_FORM, KEY_BITS, KEY_BLOCK      see `Piece` in codes.cuh
//   VALUE_FORM, VALUE_BITS, VALUE_BLOCK
//   KEY_CENTERED                       whether heads of a page have means
//   ONE_TABLE, VALUE_TABLE             whether values have the keys' codewords; where theirs are in shared memory
//   QUERY_TILES                        of 8 queries, that a block takes
//   WARPS, MIN_BLOCKS                  of a block; that a multiprocessor has room for
//   MASK                               0 none, 1 bool, 2 float32
//   SOFTCAP                            whether logits are bent
#include "codes.cuh"

constexpr int STEPS = HEAD_DIM / 16, UNIT = 64, TILE = 16, TILES = UNIT / TILE;
constexpr int COLUMNS = 5;  // of a side's addresses: codes, norms, ranges, means, channel scales
constexpr float LOG2E = 1.4426950408889634f;
// How far (in powers of two) logits and norms may pass what they are measured from before sums are scaled anew.
constexpr float SLACK = 6.0f;

using Key = Piece<static_cast<Form>(KEY_FORM), KEY_BITS, KEY_BLOCK, 4>;
using Value = Piece<static_cast<Form>(VALUE_FORM), VALUE_BITS, VALUE_BLOCK, 8>;
using KeyNorms = Norms<static_cast<Form>(KEY_FORM)>;
using ValueNorms = Norms<static_cast<Form>(VALUE_FORM)>;

// A function's argument that the compiler knows.
template <bool VALUE>
struct Known {
  static constexpr bool value = VALUE;
};

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

// What a launch is about: whole numbers come as 64 bits and others as float64, as Python has them.
struct Sizes {
  int row0, head0, rows, heads, queries, length, start, spans, tokens, capacity, units_each, slot;
};

struct Mask {
  const void* start;
  u64 row, head, query;
};

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

// The bytes of a page's mean: a lane has four of 128, and their power of two.
struct Mean {
  static constexpr int WORDS = (HEAD_DIM + 127) / 128;
  u32 words[WORDS];
  int exponent;

  __device__ __forceinline__ void read(const u8* head, int lane) {
    exponent = static_cast<signed char>(__ldg(head));
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      words[i] = 0;
      if (128 * i + 4 * lane >= HEAD_DIM) continue;
      // Not aligned: of the two words that have them.
      const u64 first = reinterpret_cast<u64>(head + 1 + 128 * i + 4 * lane);
      const u32* const from = reinterpret_cast<const u32*>(first & ~3ull);
      words[i] = __funnelshift_r(__ldg(from), first & 3 ? __ldg(from + 1) : 0, 8 * (first & 3));
    }
  }
  // Coordinates 4 j .. 4 j + 3 of piece c of four.
  __device__ __forceinline__ uint2 coordinates(int j, int c) const {
    const int word = c * STEPS + j;
    u32 numbers = __shfl_sync(ALL, words[0], word % 32);
    if (WORDS > 1) {
      const u32 others = __shfl_sync(ALL, words[WORDS - 1], word % 32);
      numbers = word < 32 ? numbers : others;
    }
    return from_int8(numbers);
  }
};

// The units of a warp: where they lie, and what has been read of the one at hand and the one that follows.
struct Units {
  const Sizes& sizes;
  const long long* addresses;
  int row, head, lane, stop, of_span;
  const u8 *key_codes, *value_codes;
  Key keys[2];
  Value values[4];
  KeyNorms key_norms;  // of tokens lane and lane + 32
  ValueNorms value_norms;
  Mean mean;
  u64 upcoming;  // the lane's column of the addresses of the unit that follows

  __device__ __forceinline__ Units(const Sizes& sizes, const long long* addresses, int row, int head, int lane)
      : sizes(sizes), addresses(addresses), row(row), head(head), lane(lane), upcoming(0) {
    of_span = (sizes.tokens + UNIT - 1) / UNIT;
    stop = min((static_cast<int>(blockIdx.x) + 1) * sizes.units_each, sizes.spans * of_span);
  }
  __device__ __forceinline__ int span(int unit) const { return of_span == 1 ? unit : unit / of_span; }
  __device__ __forceinline__ int begin(int unit) const { return of_span == 1 ? 0 : unit % of_span * UNIT; }
  // How far the last token of a span is from the first one of a unit.
  __device__ __forceinline__ int room(int unit) const { return sizes.tokens - 1 - begin(unit); }

  __device__ __forceinline__ void fetch(int unit) {
    if (unit < stop && lane < 2 * COLUMNS)
      upcoming = addresses[(static_cast<u64>(row) * sizes.spans + span(unit)) * (2 * COLUMNS) + lane];
  }
  __device__ __forceinline__ const u8* column(int index) const {
    return reinterpret_cast<const u8*>(__shfl_sync(ALL, upcoming, index));
  }
  __device__ __forceinline__ void read_norms(int unit) {
    const u64 first = static_cast<u64>(head) * sizes.capacity;
    const u8 *const of_keys = column(1), *const of_values = column(COLUMNS + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = min(begin(unit) + lane + 32 * i, sizes.tokens - 1);
      key_norms.read(i, of_keys, first + at);
      value_norms.read(i, of_values, first + at);
    }
    key_norms.read_range(column(2), head);
    value_norms.read_range(column(COLUMNS + 2), head);
    if (KEY_CENTERED) mean.read(column(3) + head * (1 + HEAD_DIM), lane);
  }
  __device__ __forceinline__ void open(int unit) {
    const u64 first = static_cast<u64>(head) * sizes.capacity + begin(unit);
    key_codes = column(0) + first * Key::VECTOR_BYTES;
    value_codes = column(COLUMNS) + first * Value::VECTOR_BYTES;
  }
  // Of a tile; if the unit is not WHOLE, its last token stands in for those behind it.
  template <bool WHOLE>
  __device__ __forceinline__ void read_keys(int tile, int last) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = tile * TILE + lane / 4 + 8 * i;
      keys[i].read(key_codes + (WHOLE ? token : min(token, last)) * Key::VECTOR_BYTES, lane % 4);
    }
  }
  template <bool WHOLE>
  __device__ __forceinline__ void read_values(int tile, int last) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * TILE + lane % 4 * 2 + i % 2 + 8 * (i / 2);
      values[i].read(value_codes + (WHOLE ? token : min(token, last)) * Value::VECTOR_BYTES, lane / 4);
    }
  }
  __device__ __forceinline__ void read_first_keys(int unit) {
    const int last = room(unit);
    if (last >= UNIT - 1)
      read_keys<true>(0, last);
    else
      read_keys<false>(0, last);
  }
  __device__ __forceinline__ void read_first_values(int unit) {
    const int last = room(unit);
    if (last >= UNIT - 1)
      read_values<true>(0, last);
    else
      read_values<false>(0, last);
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

// A block's work, of which every warp has a copy.
struct Block {
  const Sizes& sizes;
  const Mask& mask;
  Units units;
  Queries queries[QUERY_TILES];
  Sums sums[QUERY_TILES];
  float softcap;
  int first;  // of the queries
  int lane, g, c;
  u32 key_table, value_table, key_lane, value_lane;
  float reference = -infinity();  // values' norms are taken relative to two to it

  __device__ __forceinline__ Block(const Sizes& sizes, const Mask& mask, const long long* addresses, int row, int head,
                                   int first, float softcap, int lane)
      : sizes(sizes), mask(mask), units(sizes, addresses, row, head, lane), softcap(softcap), first(first), lane(lane),
        g(lane / 4), c(lane % 4) {}

  __device__ __forceinline__ void copy_tables(const u32* key_codewords, const u32* value_codewords) {
    extern __shared__ __align__(128) u8 shared[];
    copy_table<static_cast<Form>(KEY_FORM), KEY_BITS, KEY_BLOCK>(shared, key_codewords);
    if (!ONE_TABLE)
      copy_table<static_cast<Form>(VALUE_FORM), VALUE_BITS, VALUE_BLOCK>(shared + VALUE_TABLE, value_codewords);
    key_table = static_cast<u32>(__cvta_generic_to_shared(shared));
    value_table = key_table + (ONE_TABLE ? 0 : VALUE_TABLE);
    // Copies of 4 bytes for 32 banks, of 8 for 16 pairs of them.
    key_lane = KEY_BLOCK == 4 ? lane % 16 * 8 : lane * 4;
    value_lane = VALUE_BLOCK == 4 ? lane % 16 * 8 : lane * 4;
  }

  // Products of keys of a tile with queries.
  __device__ __forceinline__ void score(float (&logits)[QUERY_TILES][4]) const {
    // In two sums: a product waits for the one before it.
    float others[QUERY_TILES][4] = {};
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      const uint2 near = units.keys[0].coordinates(j, key_table, key_lane);
      const uint2 far = units.keys[1].coordinates(j, key_table, key_lane);
      const u32 operand[4] = {near.x, far.x, near.y, far.y};
#pragma unroll
      for (int q = 0; q < QUERY_TILES; ++q) multiply(j % 2 ? others[q] : logits[q], operand, queries[q].columns[j]);
    }
#pragma unroll
    for (int q = 0; q < QUERY_TILES; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[q][i] += others[q][i];
  }

  // Adds values of a tile, weighted.
  __device__ __forceinline__ void mix(const u32 (&weights)[QUERY_TILES][2]) {
#pragma unroll
    for (int j = 0; j < STEPS / 2; ++j) {
      uint2 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = units.values[i].coordinates(j, value_table, value_lane);
      const u32 near[4] = {__byte_perm(pairs[0].x, pairs[1].x, 0x5410), __byte_perm(pairs[0].x, pairs[1].x, 0x7632),
                           __byte_perm(pairs[2].x, pairs[3].x, 0x5410), __byte_perm(pairs[2].x, pairs[3].x, 0x7632)};
      const u32 far[4] = {__byte_perm(pairs[0].y, pairs[1].y, 0x5410), __byte_perm(pairs[0].y, pairs[1].y, 0x7632),
                          __byte_perm(pairs[2].y, pairs[3].y, 0x5410), __byte_perm(pairs[2].y, pairs[3].y, 0x7632)};
#pragma unroll
      for (int q = 0; q < QUERY_TILES; ++q) {
        multiply(sums[q].outputs[2 * j], near, weights[q]);
        multiply(sums[q].outputs[2 * j + 1], far, weights[q]);
      }
    }
  }

  // <q, mean>: every row of A is the mean, so that every lane gets its queries' products.
  __device__ __forceinline__ void add_mean(float (&offsets)[QUERY_TILES][2]) const {
    float products[QUERY_TILES][4] = {};
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
      const uint2 pairs = units.mean.coordinates(j, c);
      const u32 operand[4] = {pairs.x, pairs.x, pairs.y, pairs.y};
#pragma unroll
      for (int q = 0; q < QUERY_TILES; ++q) multiply(products[q], operand, queries[q].columns[j]);
    }
    const float scale = power_of_two(units.mean.exponent);
#pragma unroll
    for (int q = 0; q < QUERY_TILES; ++q)
#pragma unroll
      for (int i = 0; i < 2; ++i) offsets[q][i] = fmaf(products[q][i] * scale, queries[q].factors[i], offsets[q][i]);
  }

  // Query `index` of a tile and token `token` of the layer.
  __device__ __forceinline__ float masked(float logit, int index, int token) const {
    const int mine = min(first + index, sizes.queries - 1);
    const int query_head = (sizes.head0 + units.head) * (sizes.queries / sizes.length) + mine / sizes.length;
    const u64 from = (sizes.row0 + units.row) * mask.row + query_head * mask.head +
                     mine % sizes.length * mask.query + token;
    if (MASK == 1) return static_cast<const u8*>(mask.start)[from] ? logit : -infinity();
    return fmaf(static_cast<const float*>(mask.start)[from], LOG2E, logit);
  }

  // All tiles of a unit; `next` is the warp's next one.
  template <bool WHOLE>
  __device__ __forceinline__ void read(int unit, int next, const float (&key_norms)[2], const float (&value_norms)[2],
                                       const float (&offsets)[QUERY_TILES][2]) {
    const int room = units.room(unit);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (!WHOLE && tile * TILE > room) continue;
      const bool last = tile == TILES - 1 || (!WHOLE && (tile + 1) * TILE > room);
      float logits[QUERY_TILES][4] = {};
      score(logits);
      if (!last)
        units.template read_keys<WHOLE>(tile + 1, room);
      else if (next < units.stop) {
        // This tile's values are in registers: addresses can change.
        units.open(next);
        units.read_first_keys(next);
      }
      float norms[2], shares[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        norms[i] = __shfl_sync(ALL, key_norms[tile / 2], tile % 2 * TILE + g + 8 * i);
        shares[i] = __shfl_sync(ALL, value_norms[tile / 2], tile % 2 * TILE + g + 8 * i);
      }
      bool risen = false;
#pragma unroll
      for (int q = 0; q < QUERY_TILES; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = tile * TILE + g + 8 * (i / 2);
          float logit = fmaf(logits[q][i] * norms[i / 2], queries[q].factors[i % 2], offsets[q][i % 2]);
          if (SOFTCAP) logit = bent(logit, softcap) * LOG2E;
          if (MASK)
            logit = masked(logit, 8 * q + 2 * c + i % 2,
                           sizes.start + units.span(unit) * sizes.tokens + units.begin(unit) + min(at, room));
          logits[q][i] = WHOLE || at <= room ? logit : -infinity();
          risen |= logits[q][i] > sums[q].peaks[i % 2] + SLACK;
        }
      if (__any_sync(ALL, risen)) {
#pragma unroll
        for (int q = 0; q < QUERY_TILES; ++q) sums[q].rise(logits[q]);
      }
      u32 weights[QUERY_TILES][2];
#pragma unroll
      for (int q = 0; q < QUERY_TILES; ++q) sums[q].weigh(weights[q], logits[q], shares);
      // Two tiles ahead of their use.
      if ((tile == 1 || (last && tile < 1)) && next < units.stop) units.read_norms(next);
      mix(weights);
      if (!last)
        units.template read_values<WHOLE>(tile + 1, room);
      else if (next < units.stop)
        units.read_first_values(next);
    }
  }

  __device__ __forceinline__ void read_all(int warp) {
    for (int unit = blockIdx.x * sizes.units_each + warp; unit < units.stop; unit += WARPS) {
      const float top = units.value_norms.top();
      if (top > reference + SLACK) {
        const float fading = reference == -infinity() ? 0.0f : power_of_two(reference - top);
        reference = top;
#pragma unroll
        for (int q = 0; q < QUERY_TILES; ++q) sums[q].fade(fading);
      }
      float key_norms[2], value_norms[2], offsets[QUERY_TILES][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        key_norms[i] = units.key_norms.norm(i, 0.0f);
        value_norms[i] = units.value_norms.norm(i, reference);
#pragma unroll
        for (int q = 0; q < QUERY_TILES; ++q) offsets[q][i] = queries[q].biases[i];
      }
      if (KEY_CENTERED) add_mean(offsets);
      units.fetch(unit + WARPS);
      if (units.room(unit) >= UNIT - 1)
        read<true>(unit, unit + WARPS, key_norms, value_norms, offsets);
      else
        read<false>(unit, unit + WARPS, key_norms, value_norms, offsets);
    }
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    attend(const float* query, const float* bias, const long long* addresses, const u32* key_codewords,
           const u32* value_codewords, const void* mask_start, float* out, float* lse, long long row0, long long head0,
           long long rows, long long heads, long long num_queries, long long length, long long start, long long spans,
           long long tokens, long long capacity, long long units_each, long long slot, long long mask_row,
           long long mask_head, long long mask_query, double scale, double softcap) {
  const Sizes sizes = {int(row0),  int(head0), int(rows),   int(heads),    int(num_queries), int(length),
                       int(start), int(spans), int(tokens), int(capacity), int(units_each),  int(slot)};
  const Mask mask = {mask_start, u64(mask_row), u64(mask_head), u64(mask_query)};
  // By a shuffle, which tells the compiler that a warp's lanes agree: it may keep what they share in uniform registers.
  const int lane = threadIdx.x % 32, warp = __shfl_sync(ALL, threadIdx.x / 32, 0);
  const int blocks = (sizes.queries + 8 * QUERY_TILES - 1) / (8 * QUERY_TILES);
  const int head = blockIdx.y / blocks, first = blockIdx.y % blocks * 8 * QUERY_TILES, row = blockIdx.z;
  const u64 matrix = static_cast<u64>(sizes.row0 + row) * sizes.heads + sizes.head0 + head;

  Block block(sizes, mask, addresses, row, head, first, softcap, lane);
  // Memory is asked for the first codes before anything else.
  const int unit = blockIdx.x * sizes.units_each + warp;
  block.units.fetch(unit);
  if (unit < block.units.stop) {
    block.units.open(unit);
    block.units.read_first_keys(unit);
    block.units.read_first_values(unit);
    block.units.read_norms(unit);
  }
#pragma unroll
  for (int q = 0; q < QUERY_TILES; ++q)
    block.queries[q].read(query, bias, matrix, first + 8 * q, sizes.queries, scale * (SOFTCAP ? 1.0 : LOG2E), block.g,
                          block.c);
  block.copy_tables(key_codewords, value_codewords);
  __syncthreads();
  block.read_all(warp);

  const float norm = block.reference == -infinity() ? 0.0f : power_of_two(block.reference);
  const u64 into = (static_cast<u64>(sizes.slot + blockIdx.x) * sizes.rows * sizes.heads + matrix) * sizes.queries;
#pragma unroll
  for (int q = 0; q < QUERY_TILES; ++q)
    write(block.sums[q], norm, warp, lane, first + 8 * q, sizes.queries, into, out, lse);
}
