// The pure read: every byte once, nothing done with it. What attention on pages is compared with.
#include "read.h"

#include <cstring>

namespace fibkv {

uint64_t read_bytes(const uint8_t* from, size_t nbytes, int threads) {
  constexpr size_t kLine = 64, kAhead = 64 * kLine;
  const int64_t lines = static_cast<int64_t>(nbytes / kLine);
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
  for (int64_t line = 0; line < lines; ++line) {
    const uint8_t* at = from + line * kLine;
    __builtin_prefetch(at + kAhead);
    uint64_t words[kLine / 8];
    std::memcpy(words, at, kLine);
    for (uint64_t word : words) sum += word;
  }
  return sum;
}

}  // namespace fibkv
