// Encoding and decoding as Python sees them. Addresses come from contiguous CPU tensors whose dtypes and shapes were
// checked there; what is shared out here among threads are vectors, or groups of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "bindings.h"
#include "encode.h"
#include "fib_coder.h"
#include "klt_coder.h"
#include "openmp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fibkv {

namespace portable {
extern const EncodeKernels encode_tables[3];
}
#ifdef FIBKV_X86
namespace avx2 {
extern const EncodeKernels encode_tables[3];
}
namespace avx512 {
extern const EncodeKernels encode_tables[3];
}
#endif

const EncodeKernels& encode_kernels(Isa isa, Element element) {
  const int of = static_cast<int>(element);
  switch (isa) {
#ifdef FIBKV_X86
    case Isa::avx512: return avx512::encode_tables[of];
    case Isa::avx2: return avx2::encode_tables[of];
#endif
    default: return portable::encode_tables[of];
  }
}

namespace {

// Vectors that one thread takes at a time: a multiple of all lanes.
constexpr int64_t kShare = 64;

int64_t element_bytes(Element element) { return element == Element::f32 ? 4 : 2; }

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Memory for each thread, aligned to 64.
class Scratch {
 public:
  Scratch(size_t nbytes, int threads)
      : stride_((nbytes + 63) / 64 * 64), memory_(static_cast<char*>(std::aligned_alloc(64, stride_ * threads))) {
    if (!memory_) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  void* of_thread(int thread) const { return memory_ + stride_ * thread; }

 private:
  size_t stride_;
  char* memory_;
};

// Calls body(start, count, thread) for shares of `total`; on the calling thread alone where there is one share.
template <class Body>
void share(int64_t total, int64_t size, int threads, Body body) {
  const int64_t shares = (total + size - 1) / size;
#pragma omp parallel for num_threads(threads) if (threads > 1 && shares > 1)
  for (int64_t i = 0; i < shares; ++i) {
    const int64_t start = i * size;
    body(start, std::min(size, total - start), omp_get_thread_num());
  }
}

bool encode_fib(const FibCoder& coder, uintptr_t rows, Element element, int64_t count, uintptr_t codes,
                uintptr_t norms, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const FibForm& form = coder.form();
  const int64_t row_bytes = form.dim * element_bytes(element);
  const Scratch scratch(kernels.scratch_bytes(form), threads);
  std::atomic<bool> finite{true};
  share(count, kShare, threads, [&](int64_t start, int64_t some, int thread) {
    if (!kernels.encode_fib(form, at<char>(rows) + start * row_bytes, some,
                            at<uint8_t>(codes) + start * form.code_bytes(), at<double>(norms) + start,
                            scratch.of_thread(thread))) {
      finite = false;
    }
  });
  return finite;
}

void decode_fib(const FibCoder& coder, uintptr_t codes, uintptr_t norms, int64_t count, uintptr_t out,
                Element element, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const FibForm& form = coder.form();
  const int64_t row_bytes = form.dim * element_bytes(element);
  const Scratch scratch(kernels.scratch_bytes(form), threads);
  share(count, kShare, threads, [&](int64_t start, int64_t some, int thread) {
    kernels.decode_fib(form, at<uint8_t>(codes) + start * form.code_bytes(), at<float>(norms) + start, some,
                       at<char>(out) + start * row_bytes, scratch.of_thread(thread));
  });
}

// Groups of `tokens` vectors, of head 0, 1 and so on, over and over.
bool encode_klt(const KltCoder& coder, uintptr_t rows, Element element, int64_t groups, int64_t tokens, uintptr_t codes,
                uintptr_t norms, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const KltForm& form = coder.form();
  const Scratch scratch(kernels.klt_scratch_bytes(form), threads);
  std::atomic<bool> finite{true};
  share(groups, 1, threads, [&](int64_t i, int64_t, int thread) {
    const int64_t first = i * tokens;
    if (!kernels.encode_klt(form, static_cast<int>(i % form.heads),
                            at<char>(rows) + first * form.dim * element_bytes(element), tokens,
                            at<uint8_t>(codes) + first * form.code_bytes, at<double>(norms) + first,
                            scratch.of_thread(thread))) {
      finite = false;
    }
  });
  return finite;
}

void decode_klt(const KltCoder& coder, uintptr_t codes, uintptr_t norms, int64_t groups, int64_t tokens, uintptr_t out,
                Element element, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const KltForm& form = coder.form();
  const Scratch scratch(kernels.klt_scratch_bytes(form), threads);
  share(groups, 1, threads, [&](int64_t i, int64_t, int thread) {
    const int64_t first = i * tokens;
    kernels.decode_klt(form, static_cast<int>(i % form.heads), at<uint8_t>(codes) + first * form.code_bytes,
                       at<float>(norms) + first, tokens, at<char>(out) + first * form.dim * element_bytes(element),
                       scratch.of_thread(thread));
  });
}

template <auto kernel>
bool encode_scaled(uintptr_t rows, Element element, int64_t count, int dim, uintptr_t values, uintptr_t scales,
                   int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const auto encode = encode_kernels(isa, element).*kernel;
  const int64_t row_bytes = dim * element_bytes(element);
  std::atomic<bool> finite{true};
  share(count, kShare, threads, [&](int64_t start, int64_t some, int) {
    if (!encode(at<char>(rows) + start * row_bytes, some, dim, at<uint8_t>(values) + start * dim,
                at<uint16_t>(scales) + start)) {
      finite = false;
    }
  });
  return finite;
}

template <auto kernel>
void decode_scaled(uintptr_t values, uintptr_t scales, int64_t count, int dim, uintptr_t out, Element element,
                   int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const auto decode = encode_kernels(isa, element).*kernel;
  const int64_t row_bytes = dim * element_bytes(element);
  share(count, kShare, threads, [&](int64_t start, int64_t some, int) {
    decode(at<uint8_t>(values) + start * dim, at<uint16_t>(scales) + start, some, dim,
           at<char>(out) + start * row_bytes);
  });
}

bool divide_channels(uintptr_t rows, Element element, int64_t groups, int64_t tokens, int dim, uintptr_t scales,
                     uintptr_t divided, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const int64_t group = tokens * dim;
  std::atomic<bool> finite{true};
  share(groups, 1, threads, [&](int64_t i, int64_t, int) {
    if (!kernels.divide_channels(at<char>(rows) + i * group * element_bytes(element), tokens, dim,
                                 at<uint16_t>(scales) + i * dim, at<float>(divided) + i * group)) {
      finite = false;
    }
  });
  return finite;
}

void multiply_channels(uintptr_t rows, uintptr_t scales, int64_t groups, int64_t tokens, int dim, uintptr_t out,
                       Element element, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const int64_t group = tokens * dim;
  share(groups, 1, threads, [&](int64_t i, int64_t, int) {
    kernels.multiply_channels(at<float>(rows) + i * group, at<uint16_t>(scales) + i * dim, tokens, dim,
                              at<char>(out) + i * group * element_bytes(element));
  });
}

void mean_rows(uintptr_t rows, Element element, int64_t groups, int64_t tokens, int dim, uintptr_t means, int threads,
               Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const int64_t group = tokens * dim;
  share(groups, 1, threads, [&](int64_t i, int64_t, int) {
    kernels.mean_rows(at<char>(rows) + i * group * element_bytes(element), tokens, dim, at<double>(means) + i * dim);
  });
}

void subtract_from_rows(uintptr_t rows, Element element, int64_t groups, int64_t tokens, int dim, uintptr_t taken,
                        uintptr_t out, int threads, Isa isa) {
  nb::gil_scoped_release unlocked;
  const EncodeKernels& kernels = encode_kernels(isa, element);
  const int64_t group = tokens * dim;
  share(groups, 1, threads, [&](int64_t i, int64_t, int) {
    kernels.subtract_from_rows(at<char>(rows) + i * group * element_bytes(element), tokens, dim,
                               at<float>(taken) + i * dim, at<float>(out) + i * group);
  });
}

// Groups of norms that one thread takes at a time: a vector's norm is some hundred times faster than its codes.
int64_t norm_groups(int64_t tokens) { return std::max<int64_t>(1, 64 * kShare / tokens); }

bool encode_norms(uintptr_t norms, int64_t groups, int64_t tokens, uintptr_t codes, uintptr_t ranges, int threads,
                  Isa isa) {
  nb::gil_scoped_release unlocked;
  const auto encode = encode_kernels(isa, Element::f32).encode_norms;
  std::atomic<bool> held{true};
  share(groups, norm_groups(tokens), threads, [&](int64_t start, int64_t some, int) {
    for (int64_t i = start; i < start + some; ++i) {
      if (!encode(at<double>(norms) + i * tokens, tokens, at<uint8_t>(codes) + i * tokens,
                  at<uint16_t>(ranges) + 2 * i)) {
        held = false;
      }
    }
  });
  return held;
}

void decode_norms(uintptr_t codes, uintptr_t ranges, int64_t groups, int64_t tokens, uintptr_t norms, int threads,
                  Isa isa) {
  nb::gil_scoped_release unlocked;
  const auto decode = encode_kernels(isa, Element::f32).decode_norms;
  share(groups, norm_groups(tokens), threads, [&](int64_t start, int64_t some, int) {
    for (int64_t i = start; i < start + some; ++i) {
      decode(at<uint8_t>(codes) + i * tokens, at<uint16_t>(ranges) + 2 * i, tokens, at<float>(norms) + i * tokens);
    }
  });
}

void make_coder(FibCoder* self, int dim, int block, int size, int bits, bool gain_corrected, uintptr_t codewords,
                uintptr_t matrix, uintptr_t signs, int rounds, uintptr_t decisions, int side, float extent,
                std::vector<float> scales, float farthest) {
  new (self) FibCoder(FibSettings{dim, block, size, bits, gain_corrected, at<float>(codewords), at<float>(matrix),
                                  at<int8_t>(signs), rounds, at<uint8_t>(decisions), side, extent,
                                  std::move(scales), farthest});
}

void make_trellis_coder(FibCoder* self, int dim, int bits, bool gain_corrected, uintptr_t codewords, uintptr_t matrix,
                        uintptr_t signs, int rounds, std::vector<float> scales, int window, int overlap,
                        float cells_per_one, float word_length, float word_unit, int reach, int ways, int rows, uintptr_t columns, uintptr_t costs,
                        std::vector<int> label_columns) {
  const FibSettings settings{dim, 1, 1 << window, bits, gain_corrected, at<float>(codewords), at<float>(matrix),
                             at<int8_t>(signs), rounds, nullptr, 0, 0.0f, std::move(scales)};
  new (self) FibCoder(settings, TrellisSettings{overlap, cells_per_one, word_length, word_unit, reach, ways, rows,
                                               at<uint8_t>(columns), at<uint8_t>(costs), std::move(label_columns)});
}

}  // namespace

void bind_encoding(nb::module_& m) {
  nb::enum_<Element>(m, "Element")
      .value("f32", Element::f32)
      .value("f16", Element::f16)
      .value("bf16", Element::bf16);
  nb::class_<FibCoder>(m, "FibCoder")
      .def("__init__", &make_coder, nb::kw_only(), "dim"_a, "block"_a, "size"_a, "bits"_a, "gain_corrected"_a,
           "codewords"_a, "matrix"_a, "signs"_a, "rounds"_a, "decisions"_a, "side"_a, "extent"_a, "scales"_a,
           "farthest"_a = 1.0f)
      .def("__init__", &make_trellis_coder, nb::kw_only(), "dim"_a, "bits"_a, "gain_corrected"_a, "codewords"_a,
           "matrix"_a, "signs"_a, "rounds"_a, "scales"_a, "window"_a, "overlap"_a, "cells_per_one"_a,
           "word_length"_a, "word_unit"_a, "reach"_a, "ways"_a, "rows"_a, "columns"_a, "costs"_a, "label_columns"_a);
  nb::class_<KltCoder>(m, "KltCoder")
      .def("__init__",
           [](KltCoder* self, int dim, int heads, uintptr_t widths, uintptr_t weights, const FibCoder& two,
              const FibCoder& four, const FibCoder& six, const FibCoder& eight, std::vector<float> scales) {
             new (self) KltCoder(dim, heads, at<uint8_t>(widths), at<double>(weights), {&two, &four, &six, &eight},
                                 std::move(scales));
           },
           "dim"_a, "heads"_a, "widths"_a, "weights"_a, "two"_a, "four"_a, "six"_a, "eight"_a, "scales"_a,
           nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>());
  m.def("encode_klt", &encode_klt, "coder"_a, "rows"_a, "element"_a, "groups"_a, "tokens"_a, "codes"_a, "norms"_a,
        "threads"_a, "isa"_a);
  m.def("decode_klt", &decode_klt, "coder"_a, "codes"_a, "norms"_a, "groups"_a, "tokens"_a, "out"_a, "element"_a,
        "threads"_a, "isa"_a);
  m.def("encode_fib", &encode_fib, "coder"_a, "rows"_a, "element"_a, "count"_a, "codes"_a, "norms"_a, "threads"_a,
        "isa"_a);
  m.def("decode_fib", &decode_fib, "coder"_a, "codes"_a, "norms"_a, "count"_a, "out"_a, "element"_a, "threads"_a,
        "isa"_a);
  m.def("encode_int8", &encode_scaled<&EncodeKernels::encode_int8>, "rows"_a, "element"_a, "count"_a, "dim"_a,
        "values"_a, "scales"_a, "threads"_a, "isa"_a);
  m.def("encode_e4m3", &encode_scaled<&EncodeKernels::encode_e4m3>, "rows"_a, "element"_a, "count"_a, "dim"_a,
        "values"_a, "scales"_a, "threads"_a, "isa"_a);
  m.def("decode_int8", &decode_scaled<&EncodeKernels::decode_int8>, "values"_a, "scales"_a, "count"_a, "dim"_a,
        "out"_a, "element"_a, "threads"_a, "isa"_a);
  m.def("decode_e4m3", &decode_scaled<&EncodeKernels::decode_e4m3>, "values"_a, "scales"_a, "count"_a, "dim"_a,
        "out"_a, "element"_a, "threads"_a, "isa"_a);
  m.def("divide_channels", &divide_channels, "rows"_a, "element"_a, "groups"_a, "tokens"_a, "dim"_a, "scales"_a,
        "divided"_a, "threads"_a, "isa"_a);
  m.def("multiply_channels", &multiply_channels, "rows"_a, "scales"_a, "groups"_a, "tokens"_a, "dim"_a, "out"_a,
        "element"_a, "threads"_a, "isa"_a);
  m.def("mean_rows", &mean_rows, "rows"_a, "element"_a, "groups"_a, "tokens"_a, "dim"_a, "means"_a, "threads"_a,
        "isa"_a);
  m.def("subtract_from_rows", &subtract_from_rows, "rows"_a, "element"_a, "groups"_a, "tokens"_a, "dim"_a, "taken"_a,
        "out"_a, "threads"_a, "isa"_a);
  m.def("encode_norms", &encode_norms, "norms"_a, "groups"_a, "tokens"_a, "codes"_a, "ranges"_a, "threads"_a,
        "isa"_a);
  m.def("decode_norms", &decode_norms, "codes"_a, "ranges"_a, "groups"_a, "tokens"_a, "norms"_a, "threads"_a,
        "isa"_a);
}

}  // namespace fibkv
