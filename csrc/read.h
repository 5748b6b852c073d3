#pragma once

#include <cstddef>
#include <cstdint>

namespace fibkv {

// Sum of the 64-bit words of the whole 64-byte lines in `nbytes` bytes.
uint64_t read_bytes(const uint8_t* from, size_t nbytes, int threads);

}  // namespace fibkv
