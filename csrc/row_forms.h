// Rows of queries and outputs: float32 or bfloat16, as a model computes in them, to float32 and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "side.h"

namespace fibkv {

inline int64_t element_bytes(Form form) { return form == Form::bf16 ? 2 : 4; }

inline const uint8_t* element_at(const void* rows, Form form, int64_t index) {
  return static_cast<const uint8_t*>(rows) + index * element_bytes(form);
}

inline uint8_t* element_at(void* rows, Form form, int64_t index) {
  return static_cast<uint8_t*>(rows) + index * element_bytes(form);
}

inline void read_row(Form form, const uint8_t* from, int dim, float* to) {
  if (form == Form::f32) {
    std::memcpy(to, from, dim * sizeof(float));
    return;
  }
  for (int i = 0; i < dim; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// Rounds to the nearest, ties to even; what is no number stays none.
inline void write_row(Form form, const float* from, int dim, uint8_t* to) {
  if (form == Form::f32) {
    std::memcpy(to, from, dim * sizeof(float));
    return;
  }
  for (int i = 0; i < dim; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const uint16_t half = from[i] == from[i] ? rounded : 0x7FC0;
    std::memcpy(to + 2 * i, &half, 2);
  }
}

}  // namespace fibkv
