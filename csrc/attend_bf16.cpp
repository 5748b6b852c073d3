// Products of bfloat16 numbers, for processors of AVX-512 that have them.
#include <immintrin.h>

#include "attend_many.h"

namespace fibkv {
namespace FIBKV_ISA {
namespace {

// Two numbers to a word, the first in its lower half.
struct Pairs {
  static constexpr int numbers = 2;

  static vi part(const float* from, int count) {
    return narrow(load<vf>(from), count > kLanes ? load<vf>(from + kLanes) : vf{});
  }

  static vi across(const float* from, int pitch, int rows) {
    const __m512i by_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const vi pair = narrow(load<vf>(from), rows > 1 ? load<vf>(from + pitch) : vf{});
    return (vi)_mm512_permutexvar_epi16(by_turns, (__m512i)pair);
  }

  static vf plus_products(vf sums, vi a, vi b) {
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }

 private:
  static vi narrow(vf low, vf high) { return (vi)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
};

}  // namespace

const ManyKernels many_bfloat16 = many_kernels<Pairs>;

}  // namespace FIBKV_ISA
}  // namespace fibkv
