// OpenMP, or one thread where the compiler has none: what is ours then runs on the calling thread alone.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#else
#include <chrono>

inline int omp_get_thread_num() { return 0; }

inline double omp_get_wtime() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
#endif
