// How keys or values stand in memory, and what attention needs to read them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fibkv {

enum class Form : int32_t { f32, f16, bf16, int8, fp8, affine, fib, klt };

// In which order the code bytes of a span (T tokens of one head, B bytes a token) stand.
//   rows         [T][B], the canonical order
//   key_tiles    [T/16][B/4][16 tokens][4 bytes]: a 32-bit lane holds four bytes of one token, which is what a
//                four-way integer dot product adds up; 64 consecutive bytes belong to 16 tokens
//   value_tiles  [B/16][T/4][16 bytes][4 tokens]: a lane holds one code byte of four tokens, so that the same
//                instruction adds up over tokens; slices of 8 bytes where a side says so
// Tiles pad T to a multiple of 16 with zero bytes.
enum class Order : int32_t { rows, key_tiles, value_tiles };

// Largest magnitude in the int16 tables: with queries and weights of 14 bits, sums over 256 dimensions stay in int32.
constexpr float kMostWord = 511.0f;

// Largest head_dim that integer kernels read.
constexpr int kMostTiledDim = 1024;

constexpr int kTokenTile = 16;
constexpr int kValueSlice = 16;

// A rotation [dim][dim], row-major, and its transpose: y = matrix x, x = transposed y. A randomized Hadamard rotation
// also by its signs [rounds][dim], +1 or -1: each round changes signs, then takes the Walsh-Hadamard transform.
struct Rotation {
  int dim;
  const float* matrix;
  const float* transposed;
  const float* signs;  // or null
  int rounds;
};

// klt: consecutive pairs of coordinates whose indices have one width.
struct PairSection {
  int bits;  // of an index; 0: the pairs are zero
  int pairs;
  int first_bit;     // of the section in a vector's code
  const float* book;  // [1 << bits][2]
};

// Widths that a pair can have: 0, 2, 4, 6 and 8 bits.
constexpr int kPairLevels = 5;

// One side (keys or values) of one codec. Immutable; shared by all spans that it codes.
struct Side {
  Form form;
  Order order;
  int dim;         // elements of a vector
  int code_bytes;  // bytes of one vector's code, without its norm or scale
  int norm_bytes;  // of one vector's norm (fib), scale (int8, fp8) or grids (affine: two float16 for `block` channels)
  int block;       // fib: coordinates of a codeword
  int size;        // fib: codewords
  int bits;        // fib: width of an index
  int window;      // fib: bits that name a codeword, the index being the newest of them; of a trellis more than `bits`
  bool log_norms;  // fib: 8-bit logarithms with a range per head, else float16
  bool channels;   // vectors were divided by bfloat16 scales per channel first and are read in their original space; affine:
                   // a grid is of one channel over all tokens of the span
  bool centered;   // fib: vectors are their code plus the mean of their head
  const float* codewords;    // fib: [size][block]
  const Rotation* rotation;  // or null; of a side with channels, the inner one

  // klt: the sections of each head's vectors, [heads][kPairLevels], some of them empty. Spans are of these heads, over
  // and over.
  const PairSection* sections;
  int heads;

  // For integer kernels: what one code byte stands for, as `planes` coordinates in int8 times `plane_step`.
  // tables [planes][256]; int8 has one plane and no table. 0 planes: only float kernels can read this side.
  // Of three bits a coordinate, each six bits of a unit of three bytes are two planes: tables [2][64].
  // Of a trellis a code byte and the one before it stand for the planes: `tables` has one entry per label, and labels
  // are products over GF(2): matrices [planes][unit + 1] of the bytes of a unit and of the one before it, in the form
  // of gf2p8affineqb.
  int planes;
  int label_bits;  // 0 but for a trellis
  const uint64_t* matrices;
  const int8_t* tables;
  float plane_step;
  // The same in int16, for products of pairs, half as many tables: plane 2 * pair in the low half, times word_step.
  const int32_t* words;
  float word_step;
  // Bytes that hold whole coordinates: 3 of codes of 3 bits a coordinate in tiles, where the first bytes of all units
  // stand in front of the second ones, and these of the third. What is said of code bytes above then goes for units.
  int unit = 1;
  int slice = kValueSlice;  // of value tiles: bytes that stand together, 8 where units of three bytes do not fill 16

  int units() const { return code_bytes / unit; }
  // Where byte i of unit u stands among the bytes of its token.
  int place(int u, int i) const { return i * units() + u; }

  // Of one head: of what its channels have, and of its mean.
  size_t channel_bytes() const { return channels ? static_cast<size_t>(dim) * (form == Form::affine ? 4 : 2) : 0; }
  size_t mean_bytes() const { return centered ? 1 + static_cast<size_t>(dim) : 0; }
  int padded(int tokens) const {
    return order == Order::rows ? tokens : (tokens + kTokenTile - 1) / kTokenTile * kTokenTile;
  }
  // Whether logits and outputs are in a rotated space.
  const Rotation* space() const { return channels ? nullptr : rotation; }
};

// What keys went through before they were coded, per KV head: coded = A (key - mean). The query takes it back, once:
// <q, key> = <A^-T q, coded> + <q, mean>.
struct KeySpace {
  int dim;
  const float* mean;        // [heads][dim]
  const Rotation* queries;  // [heads], A^-T of each, its transpose alone; null where A is the identity
};

// Where the parts of a rectangle (heads x tokens) of codes stand behind its base pointer:
// codes [heads][padded T * B], norms [heads][padded T], ranges [heads][2] float16, channel scales [heads][dim] bfloat16,
// or two float16 (a grid) for each channel, means [heads][1 + dim] int8: a power of two, and the numbers that it multiplies.
struct Rectangle {
  int tokens;
  size_t code_stride, norm_offset, norm_stride, range_offset, channel_offset, mean_offset, nbytes;

  static Rectangle of(const Side& side, int heads, int tokens) {
    Rectangle r{};
    const size_t padded = side.padded(tokens);
    r.tokens = tokens;
    r.code_stride = padded * side.code_bytes;
    r.norm_offset = heads * r.code_stride;
    r.norm_stride = padded * side.norm_bytes;
    r.range_offset = r.norm_offset + heads * r.norm_stride;
    r.channel_offset = r.range_offset + (side.log_norms ? 4 * static_cast<size_t>(heads) : 0);
    r.mean_offset = r.channel_offset + heads * side.channel_bytes();
    r.nbytes = r.mean_offset + heads * side.mean_bytes();
    return r;
  }
};

// The codes of T tokens of one head.
struct Span {
  const uint8_t* codes;
  const uint8_t* norms;
  const uint8_t* range;
  const uint8_t* channels;
  const int8_t* mean;
  const PairSection* sections;  // klt: [kPairLevels]
  int padded;                   // tokens with padding: the pitch of value tiles

  static Span of(const Side& side, const Rectangle& r, const uint8_t* base, int head) {
    return {base + head * r.code_stride, base + r.norm_offset + head * r.norm_stride, base + r.range_offset + 4 * head,
            base + r.channel_offset + head * side.channel_bytes(),
            reinterpret_cast<const int8_t*>(base + r.mean_offset + head * side.mean_bytes()),
            side.sections ? side.sections + head % side.heads * kPairLevels : nullptr, side.padded(r.tokens)};
  }
};

}  // namespace fibkv
