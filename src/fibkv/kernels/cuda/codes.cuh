// What the attention kernel makes of codes: pairs of float16 coordinates, as operands of the matrix unit.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

enum Form { FIB, TRELLIS, INT8, FP8 };

constexpr u32 ALL = 0xffffffffu;
// Bytes from one FibQuant codeword to the next in shared memory: a code byte is the second byte of an address as it is.
// Half of them are copies of the codeword, one for each bank (or pair of banks); the other half is a second table's.
constexpr int STRIDE = 256, COPIES = 128;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float power_of_two(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}

__device__ __forceinline__ float from_half(u32 bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(static_cast<u16>(bits)));
  return number;
}

__device__ __forceinline__ u32 halves(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 difference(u32 left, u32 right) {
  u32 pair;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(left), "r"(right));
  return pair;
}

// Four int8 numbers as float16: n + 128 in the low bits of 1024, less 1152.
__device__ __forceinline__ uint2 from_int8(u32 numbers) {
  numbers ^= 0x80808080u;
  return {difference(__byte_perm(numbers, 0x64646464u, 0x4140), 0x64806480u),
          difference(__byte_perm(numbers, 0x64646464u, 0x4342), 0x64806480u)};
}

// Four e4m3 numbers as float16, divided by 256: sign, exponent and mantissa in their places of another format.
__device__ __forceinline__ uint2 from_fp8(u32 numbers) {
  const u32 low = __byte_perm(numbers, 0, 0x1404), high = __byte_perm(numbers, 0, 0x3424);
  return {(low & 0x80008000u) | (low >> 1 & 0x3f803f80u), (high & 0x80008000u) | (high >> 1 & 0x3f803f80u)};
}

// Bytes that are read once: they need not stay in the first cache.
template <int BYTES>
__device__ __forceinline__ void load(u32* words, const u8* from) {
  if constexpr (BYTES % 16 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i)
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[4 * i]), "=r"(words[4 * i + 1]), "=r"(words[4 * i + 2]), "=r"(words[4 * i + 3])
                   : "l"(from + 16 * i));
  } else if constexpr (BYTES % 8 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 8; ++i)
      asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                   : "=r"(words[2 * i]), "=r"(words[2 * i + 1])
                   : "l"(from + 8 * i));
  } else if constexpr (BYTES % 4 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i)
      asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[i]) : "l"(from + 4 * i));
  } else {
#pragma unroll
    for (int i = 0; i < (BYTES + 3) / 4; ++i) words[i] = 0;
#pragma unroll
    for (int i = 0; i < BYTES; ++i) words[i / 4] |= static_cast<u32>(__ldg(from + i)) << (8 * (i % 4));
  }
}

// As assembly, so that the table's address is added by the load itself.
__device__ __forceinline__ u32 word_at(u32 table, u32 offset) {
  u32 word;
  asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(table + offset));
  return word;
}

__device__ __forceinline__ uint2 words_at(u32 table, u32 offset) {
  uint2 words;
  asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(table + offset));
  return words;
}

// A lane's piece of a vector: one of PIECES equal ones.
//   FIB: BITS of an index, BLOCK coordinates (2 or 4) of a codeword.
//   TRELLIS: BITS of a coordinate; a window of 8 bits more begins in the piece before, whose last byte comes along.
//   INT8, FP8: BITS is 8, BLOCK 1.
template <Form FORM, int BITS, int BLOCK, int PIECES>
struct Piece {
  static constexpr int VECTOR_BYTES = HEAD_DIM / BLOCK * BITS / 8, BYTES = VECTOR_BYTES / PIECES;
  static constexpr int WORDS = (BYTES + 3) / 4;
  // At 2 and 3 bits a table has two coordinates at once, the windows of which share all but the last bits.
  static constexpr bool PAIRS = FORM == TRELLIS && BITS < 4;
  u32 words[WORDS];
  u32 before;

  // Piece `number` of the vector at `vector`.
  __device__ __forceinline__ void read(const u8* vector, int number) {
    load<BYTES>(words, vector + number * BYTES);
    if (FORM == TRELLIS) before = __ldg(vector + (number ? number * BYTES : VECTOR_BYTES) - 1) << 24;
  }

  // Coordinates 4 j .. 4 j + 3 of the piece as two pairs. Loops over j are unrolled: the compiler knows all but the
  // words. `lane` is the lane's offset in a table of copies.
  __device__ __forceinline__ uint2 coordinates(int j, u32 table, u32 lane) const {
    if constexpr (FORM == INT8) {
      return from_int8(words[j]);
    } else if constexpr (FORM == FP8) {
      return from_fp8(words[j]);
    } else if constexpr (FORM == FIB && BLOCK == 4) {
      return words_at(table, copy<BITS>(j, lane));
    } else if constexpr (FORM == FIB) {
      return {word_at(table, copy<BITS>(2 * j, lane)), word_at(table, copy<BITS>(2 * j + 1, lane))};
    } else if constexpr (PAIRS) {
      return {word_at(table, window<2 * BITS>(2 * j)), word_at(table, window<2 * BITS>(2 * j + 1))};
    } else {
      u32 ones[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) ones[i] = word_at(table, window<BITS>(4 * j + i));
      return {__byte_perm(ones[0], ones[1], 0x5410), __byte_perm(ones[2], ones[3], 0x5410)};
    }
  }

 private:
  // A number whose bits from `at` on are the `count` bits of the stream from `first` on. Both may be below zero: the
  // piece before ends there. Other bits are anything.
  __device__ __forceinline__ u32 bits(int first, int count, int at) const {
    const int start = first - at, word = (start + 32) / 32 - 1, offset = start - 32 * word, border = 32 * (word + 1);
    const u32 low = word < 0 ? before : words[word], high = words[word + 1 < WORDS ? word + 1 : WORDS - 1];
    if (offset == 0) return low;
    if (first >= border) return high << (32 - offset);
    return first + count <= border ? low >> offset : __funnelshift_r(low, high, offset);
  }

  // Where a lane finds the codeword of an index.
  template <int WIDTH>
  __device__ __forceinline__ u32 copy(int index, u32 lane) const {
    const int first = WIDTH * index;
    if (WIDTH == 8) return __byte_perm(words[first / 32], lane, 0x5504 | first % 32 / 8 << 4);
    return (bits(first, WIDTH, 8) & ((1u << WIDTH) - 1) << 8) | lane;
  }

  // Where the window that ends with the step `index` is in a table of words.
  template <int STEP>
  __device__ __forceinline__ u32 window(int index) const {
    constexpr int WIDTH = STEP + 8;
    return bits(STEP * (index + 1) - WIDTH, WIDTH, 2) & ((1u << WIDTH) - 1) << 2;
  }
};

// Factors of the vectors of one head and one unit of tokens, of which a lane has two.
//   FIB, TRELLIS: bytes c, log2 of the norm being low + (c - 1) * step, 0 for none; see `fibkv.codes.FibCodes`.
//   INT8, FP8: bfloat16 scales.
template <Form FORM>
struct Norms {
  static constexpr bool LOGS = FORM == FIB || FORM == TRELLIS;
  u16 codes[2];
  u32 range;

  __device__ __forceinline__ void read(int i, const u8* norms, u64 vector) {
    codes[i] = LOGS ? __ldg(norms + vector) : __ldg(reinterpret_cast<const u16*>(norms) + vector);
  }
  __device__ __forceinline__ void read_range(const u8* ranges, int head) {
    if (LOGS) range = __ldg(reinterpret_cast<const u32*>(ranges) + head);
  }
  // The norm times 2^-less.
  __device__ __forceinline__ float norm(int i, float less) const {
    if (LOGS) return codes[i] ? power_of_two(fmaf(codes[i] - 1.0f, from_half(range >> 16), from_half(range) - less)) : 0.0f;
    return scale(i) * power_of_two(-less);
  }
  // A power of two that no norm exceeds by much: log2 of it.
  __device__ __forceinline__ float top() const {
    if (LOGS) return fmaf(254.0f, from_half(range >> 16), from_half(range));
    float most = fmaxf(scale(0), scale(1));
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, apart));
    // Numbers of 8 bits are up to 127, or 448 / 256.
    return log2f(fmaxf(most, 1e-30f)) + (FORM == INT8 ? 7.0f : 0.0f);
  }

 private:
  __device__ __forceinline__ float scale(int i) const {
    return __uint_as_float(static_cast<u32>(codes[i]) << 16) * (FORM == FP8 ? 256.0f : 1.0f);
  }
};

// Codewords `words` (of 4 or 8 bytes) with copies for all banks, as `coordinates` looks for them.
template <Form FORM, int BITS, int BLOCK>
__device__ __forceinline__ void copy_table(u8* table, const u32* words) {
  if constexpr (FORM == FIB) {
    constexpr int CHUNKS = COPIES / 16;
    for (int i = threadIdx.x; i < CHUNKS << BITS; i += blockDim.x) {
      // Neighbouring lanes write to other banks.
      const int word = i % (1 << BITS), chunk = (i / (1 << BITS) + word) % CHUNKS;
      const u32 first = words[BLOCK / 2 * word], second = words[BLOCK / 2 * word + BLOCK / 2 - 1];
      *reinterpret_cast<uint4*>(table + word * STRIDE + 16 * chunk) = uint4{first, second, first, second};
    }
  } else if constexpr (FORM == TRELLIS) {
    constexpr int COUNT = 1 << (BITS < 4 ? 2 * BITS : BITS) + 8;
    for (int i = threadIdx.x; i < COUNT / 4; i += blockDim.x)
      reinterpret_cast<uint4*>(table)[i] = reinterpret_cast<const uint4*>(words)[i];
  }
}
