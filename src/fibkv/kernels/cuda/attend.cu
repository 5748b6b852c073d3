// Attention of a few queries on pages of codes, split over the context: CUDA C++ beside `attend_splits` in
// triton_attend.py, whose arguments and meaning it has.
//
// Why not Triton: a look-up needs a table in shared memory that stays there while a program runs, with a copy for each
// bank, so that no lane waits for another; see docs/performance/gpu.md.
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
#include "queries.cuh"

// How far (in powers of two) logits and norms may pass what they are measured from before sums are scaled anew.
constexpr float SLACK = 6.0f;

struct Mask {
  const void* start;
  u64 row, head, query;
};

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
