// Indices of codewords as bit streams: packed for all lanes at once, 32 bits at a time, and put into rows at the end.
#pragma once

#include "encode.h"
#include "encode_lanes.h"

namespace fibkv {
namespace FIBKV_ISA {

static inline int num_words(int code_bytes) { return (code_bytes + 3) / 4; }
static inline int num_words(const FibForm& form) { return num_words(form.code_bytes()); }

// Packs indices [blocks], of a trellis the newest bits of windows, into the little-endian bit stream of each lane.
// Writes up to one word more than there are.
static inline void pack_lanes(const FibForm& form, const vi* index, vi* words) {
  // Held here, as words could be anything for all that a compiler knows.
  const int blocks = form.blocks(), bits = form.bits, older = form.window - bits;
  vu open{};
  int filled = 0, word = 0;
  for (int b = 0; b < blocks; ++b) {
    const vu value = (vu)index[b] >> older;
    open |= value << filled;
    filled += bits;
    if (filled >= 32) {
      words[word++] = (vi)open;
      filled -= 32;
      open = filled ? value >> (bits - filled) : vu{};
    }
  }
  words[word] = (vi)open;
}

// Codes beyond the book are refused where they enter the program; here they must only not reach beyond its memory.
static inline void unpack_lanes(const FibForm& form, const vi* words, vi* index) {
  const vi mask = splat((1 << form.bits) - 1), last = splat(form.size - 1);
  for (int b = 0; b < form.blocks(); ++b) {
    const int bit = b * form.bits, word = bit / 32, offset = bit % 32;
    vu value = (vu)words[word] >> offset;
    if (offset + form.bits > 32) value |= (vu)words[word + 1] << (32 - offset);
    const vi found = (vi)value & mask;
    index[b] = choose(found > last, last, found);
  }
}

// Calls body(first word, bytes of a code from there on) for kLanes words of a code at a time.
template <class Body>
static inline void each_tile(int code_bytes, Body body) {
  for (int first = 0; 4 * first < code_bytes; first += kLanes) {
    const int left = code_bytes - 4 * first;
    body(first, left < 4 * kLanes ? left : 4 * kLanes);
  }
}

// Codes of `count` rows of so many bytes, from the words of each lane.
static inline void write_codes(int row, const vi* words, int count, uint8_t* codes) {
  const int length = num_words(row);
  each_tile(row, [&](int first, int nbytes) {
    vi tile[kLanes];
    for (int i = 0; i < kLanes; ++i) tile[i] = first + i < length ? words[first + i] : vi{};
    transpose(tile);
    for (int lane = 0; lane < count; ++lane) store_some(codes + (int64_t)lane * row + 4 * first, tile[lane], nbytes);
  });
}

// The way back; lanes without a row repeat the last one.
static inline void read_codes(int row, const uint8_t* codes, int count, vi* words) {
  const int length = num_words(row);
  each_tile(row, [&](int first, int nbytes) {
    vi tile[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      tile[lane] = load_some<vi>(codes + (int64_t)(lane < count ? lane : count - 1) * row + 4 * first, nbytes);
    }
    transpose(tile);
    for (int i = 0; i < kLanes && first + i < length; ++i) words[first + i] = tile[i];
  });
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
