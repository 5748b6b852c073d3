#include "isa.h"

namespace fibkv {

bool has_isa(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#ifdef FIBKV_X86
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("gfni");
#endif
    default:
      return false;
  }
}

bool has_bf16() {
#ifdef FIBKV_X86
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

Isa best_isa() {
  if (has_isa(Isa::avx512)) return Isa::avx512;
  if (has_isa(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

}  // namespace fibkv
