// The extension module: what Python sees. Every argument was checked in Python; pointers come from contiguous tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "isa.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  using fibkv::Isa;
  // Descriptions of codecs are cached for the life of the process: at its end they are not leaks.
  nb::set_leak_warnings(false);
  nb::enum_<Isa>(m, "Isa")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512);
  m.def("best_isa", &fibkv::best_isa);
  m.def("has_isa", &fibkv::has_isa);
#if defined(_OPENMP)
  m.attr("HAS_THREADS") = true;
#else
  m.attr("HAS_THREADS") = false;
#endif
  fibkv::bind_attention(m);
  fibkv::bind_encoding(m);
}
