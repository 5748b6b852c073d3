// Sides, plans and attention as Python sees them.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>

#include "bindings.h"
#include "owned.h"
#include "populate.h"
#include "read.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fibkv {
namespace {

template <typename T, int ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<uint8_t, 1>;

std::shared_ptr<OwnedSide> make_side(Form form, bool is_key, bool tiled, int dim, int code_bytes, int norm_bytes,
                                     int block, int size, int bits, int window, bool log_norms, bool channels,
                                     bool centered, std::optional<Array<float, 2>> codewords,
                                     std::optional<Bytes> labels,
                                     std::optional<Array<const double, 1>> frequencies,
                                     std::shared_ptr<OwnedRotation> rotation) {
  const SideSettings settings{form, is_key,  tiled,  dim,       code_bytes, norm_bytes, block,
                              size, bits,    window, log_norms, channels,   centered};
  return std::make_shared<OwnedSide>(settings, codewords ? codewords->data() : nullptr,
                                     labels ? labels->data() : nullptr,
                                     frequencies ? frequencies->data() : nullptr, std::move(rotation));
}

// Widths [heads][dim / 2] and the codewords of all of them.
std::shared_ptr<OwnedSide> make_klt_side(bool is_key, int dim, int code_bytes, Array<const float, 2> codewords,
                                         Array<const uint8_t, 2> widths) {
  const SideSettings settings{Form::klt, is_key, false, dim,  code_bytes, 1,    2, static_cast<int>(codewords.shape(0)),
                              8,         8,      true,  false, false};
  return std::make_shared<OwnedSide>(settings, codewords.data(), widths.data(), static_cast<int>(widths.shape(0)));
}

uint8_t* bytes_at(uintptr_t address) { return reinterpret_cast<uint8_t*>(address); }

// One rectangle between the parts of its codes in canonical order and the side's own order, all at addresses that the
// caller vouches for.
void pack(const OwnedSide& side, int heads, int tokens, uintptr_t codes, uintptr_t norms, uintptr_t ranges,
          uintptr_t channels, uintptr_t means, uintptr_t packed) {
  side.pack(heads, tokens, {bytes_at(codes), bytes_at(norms), bytes_at(ranges), bytes_at(channels), bytes_at(means)},
            bytes_at(packed));
}

void unpack(const OwnedSide& side, int heads, int tokens, uintptr_t packed, uintptr_t codes, uintptr_t norms,
            uintptr_t ranges, uintptr_t channels, uintptr_t means) {
  side.unpack(heads, tokens, bytes_at(packed),
              {bytes_at(codes), bytes_at(norms), bytes_at(ranges), bytes_at(channels), bytes_at(means)});
}

// Objects with Python's buffer protocol: contiguous bytes, held until this one goes.
class Buffers {
 public:
  // Refuses buffers of another size; `writable` or not.
  Buffers(const nb::sequence& objects, size_t nbytes, bool writable) {
    const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    views_.reserve(nb::len(objects));
    for (nb::handle object : objects) {
      Py_buffer view;
      if (PyObject_GetBuffer(object.ptr(), &view, flags)) {
        release();
        throw nb::python_error();
      }
      views_.push_back(view);
      if (static_cast<size_t>(view.len) != nbytes) {
        release();
        throw nb::value_error("a buffer of another size than its codes");
      }
    }
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;
  ~Buffers() { release(); }

  size_t size() const { return views_.size(); }
  uint8_t* at(size_t i) const { return static_cast<uint8_t*>(views_.at(i).buf); }

 private:
  void release() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
    views_.clear();
  }

  std::vector<Py_buffer> views_;
};

// Rectangles of equal size between canonical bytes in one run and the side's own order, the latter at addresses that
// the caller vouches for.
void pack_runs(const OwnedSide& side, int heads, int tokens, const nb::sequence& runs,
               const std::vector<uintptr_t>& packed) {
  const Buffers from(runs, side.canonical_nbytes(heads, tokens), false);
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < from.size(); ++i) {
    side.pack(heads, tokens, side.in_one_run(heads, tokens, from.at(i)), reinterpret_cast<uint8_t*>(packed.at(i)));
  }
}

void unpack_runs(const OwnedSide& side, int heads, int tokens, const std::vector<uintptr_t>& packed,
                 const nb::sequence& runs) {
  const Buffers to(runs, side.canonical_nbytes(heads, tokens), true);
  nb::gil_scoped_release unlocked;
  for (size_t i = 0; i < to.size(); ++i) {
    side.unpack(heads, tokens, reinterpret_cast<const uint8_t*>(packed.at(i)), side.in_one_run(heads, tokens, to.at(i)));
  }
}

std::vector<const uint8_t*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<const uint8_t*> found;
  found.reserve(addresses.size());
  for (uintptr_t address : addresses) found.push_back(reinterpret_cast<const uint8_t*>(address));
  return found;
}

void add_run(Plan& plan, int row0, int row1, int head0, int head1, int start, int tokens, int spans,
             std::shared_ptr<OwnedSide> key, std::shared_ptr<OwnedSide> value, std::shared_ptr<OwnedKeySpace> space,
             const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values) {
  Run run{};
  run.row0 = row0;
  run.row1 = row1;
  run.head0 = head0;
  run.head1 = head1;
  run.start = start;
  run.tokens = tokens;
  run.spans = spans;
  run.keys = pointers(keys);
  run.values = pointers(values);
  plan.add(std::move(run), std::move(key), std::move(value), std::move(space));
}

// How raw tails of one dtype and width are read.
struct TailForm {
  const OwnedSide* key;
  const OwnedSide* value;
};

// The raw tail: [rows][heads][capacity][dim], of which the first `length` tokens are in use.
struct Tail {
  const Side *key, *value;
  uintptr_t keys, values;
  int start, length, capacity;
};

Run tail_run(const Tail& tail, int rows, int heads) {
  Run run{};
  run.row1 = rows;
  run.head1 = heads;
  run.start = tail.start;
  run.tokens = tail.length;
  run.spans = 1;
  run.key = tail.key;
  run.value = tail.value;
  // Rectangles with the buffer's pitch: nothing but codes stands in them.
  run.key_rectangle = Rectangle::of(*run.key, heads, tail.capacity);
  run.value_rectangle = Rectangle::of(*run.value, heads, tail.capacity);
  for (int row = 0; row < rows; ++row) {
    run.keys.push_back(reinterpret_cast<const uint8_t*>(tail.keys) + row * run.key_rectangle.nbytes);
    run.values.push_back(reinterpret_cast<const uint8_t*>(tail.values) + row * run.value_rectangle.nbytes);
  }
  return run;
}

// Rows [batch][heads][count][dim] of a tail's buffer [batch][heads][capacity][dim] from `start` on, of rows with strides
// whose elements lie side by side. Addresses, which the caller vouches for.
void write_tokens(uintptr_t buffer, int64_t capacity, int64_t start, uintptr_t tokens, const nb::tuple& shape,
                  const nb::tuple& strides, int64_t element_nbytes) {
  const auto at = [](const nb::tuple& numbers, int axis) { return nb::cast<int64_t>(numbers[axis]); };
  const int64_t batch = at(shape, 0), heads = at(shape, 1), count = at(shape, 2), nbytes = at(shape, 3) * element_nbytes;
  const int64_t batch_stride = at(strides, 0), head_stride = at(strides, 1), token_stride = at(strides, 2);
  auto* to = reinterpret_cast<uint8_t*>(buffer);
  const auto* from = reinterpret_cast<const uint8_t*>(tokens);
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t token = 0; token < count; ++token) {
        const int64_t source = row * batch_stride + head * head_stride + token * token_stride;
        std::memcpy(to + ((row * heads + head) * capacity + start + token) * nbytes, from + source * element_nbytes, nbytes);
      }
    }
  }
}

struct MaskPointer {
  uintptr_t allowed, added;
  int64_t batch_stride, head_stride, query_stride;
  bool causal;
};

// Queries [batch][query_heads][length][dim] of a form and their strides; out [batch][query_heads][length][value_dim]
// of the same form, lse [batch][query_heads][length]; keys and values of the tail [batch][kv_heads][capacity][...], its
// first `tail_tokens` tokens the last of `tokens` in all. Addresses, which the caller vouches for.
void run_attend(const Plan& plan, const TailForm& tail, uintptr_t keys, uintptr_t values, const nb::tuple& tail_shape,
                int tail_tokens, uintptr_t query, Form form, const nb::tuple& shape, const nb::tuple& strides, int tokens,
                const MaskPointer& mask, float scale, float softcap, uintptr_t out, uintptr_t lse, int threads, Isa isa) {
  const int kv_heads = nb::cast<int>(tail_shape[1]), capacity = nb::cast<int>(tail_shape[2]);
  const auto size = [&](int axis) { return nb::cast<int>(shape[axis]); };
  const auto stride = [&](int axis) { return nb::cast<int64_t>(strides[axis]); };
  const Query q{reinterpret_cast<const void*>(query), form, stride(0), stride(1), stride(2), size(0), size(1), kv_heads,
                size(2), size(3), tokens - size(2)};
  std::vector<const Run*> runs;
  for (const Run& run : plan.runs()) runs.push_back(&run);
  const Side &key = tail.key->side(), &value = tail.value->side();
  const Run last = tail_tokens ? tail_run({&key, &value, keys, values, tokens - tail_tokens, tail_tokens, capacity},
                                          q.batch, kv_heads)
                               : Run{};
  if (tail_tokens) runs.push_back(&last);
  const Mask m{reinterpret_cast<const uint8_t*>(mask.allowed), reinterpret_cast<const float*>(mask.added),
               mask.batch_stride, mask.head_stride, mask.query_stride, mask.causal};
  const Output to{reinterpret_cast<void*>(out), form, reinterpret_cast<float*>(lse), value.dim};
  nb::gil_scoped_release unlocked;
  attend(attend_kernels(isa, form), runs, q, m, Softmax{scale, softcap}, threads, to);
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::enum_<Form>(m, "Form")
      .value("f32", Form::f32)
      .value("f16", Form::f16)
      .value("bf16", Form::bf16)
      .value("int8", Form::int8)
      .value("fp8", Form::fp8)
      .value("affine", Form::affine)
      .value("fib", Form::fib);
  nb::class_<OwnedRotation>(m, "Rotation").def(
      "__init__", [](OwnedRotation* self, Array<const float, 2> matrix, Array<const float, 2> signs) {
        const int rounds = static_cast<int>(signs.shape(0));
        new (self) OwnedRotation(matrix.data(), static_cast<int>(matrix.shape(0)), signs.data(), rounds);
      });
  nb::class_<OwnedKeySpace>(m, "KeySpace")
      .def("__init__",
           [](OwnedKeySpace* self, Array<const float, 2> mean, std::optional<Array<const float, 3>> inverses) {
             new (self) OwnedKeySpace(mean.data(), inverses ? inverses->data() : nullptr,
                                      static_cast<int>(mean.shape(0)), static_cast<int>(mean.shape(1)));
           },
           // Not of copies: the object reads the tensors' own memory.
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), "mean"_a.noconvert(), "inverses"_a.noconvert().none());
  nb::class_<OwnedSide>(m, "Side")
      .def(nb::new_(&make_side), nb::kw_only(), "form"_a, "is_key"_a, "tiled"_a, "dim"_a, "code_bytes"_a,
           "norm_bytes"_a, "block"_a, "size"_a, "bits"_a, "window"_a, "log_norms"_a, "channels"_a, "centered"_a,
           "codewords"_a.none(), "labels"_a.none(), "frequencies"_a.none(), "rotation"_a.none())
      .def_static("klt", &make_klt_side, nb::kw_only(), "is_key"_a, "dim"_a, "code_bytes"_a, "codewords"_a, "widths"_a)
      .def("nbytes", &OwnedSide::nbytes, "heads"_a, "tokens"_a)
      .def("canonical_nbytes", &OwnedSide::canonical_nbytes, "heads"_a, "tokens"_a)
      .def_prop_ro("on_integers", [](const OwnedSide& self) { return self.side().planes > 0; })
      .def("pack", &pack)
      .def("pack_runs", &pack_runs, "heads"_a, "tokens"_a, "runs"_a, "packed"_a)
      .def("unpack_runs", &unpack_runs, "heads"_a, "tokens"_a, "packed"_a, "runs"_a)
      .def("unpack", &unpack);
  nb::class_<Plan>(m, "Plan")
      .def(nb::init<>())
      .def("add", &add_run, nb::kw_only(), "row0"_a, "row1"_a, "head0"_a, "head1"_a, "start"_a, "tokens"_a, "spans"_a,
           "key"_a, "value"_a, "space"_a.none(), "keys"_a, "values"_a);
  nb::class_<TailForm>(m, "TailForm")
      .def("__init__", [](TailForm* self, const OwnedSide& key, const OwnedSide& value) { new (self) TailForm{&key, &value}; },
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());
  nb::class_<MaskPointer>(m, "Mask")
      .def("__init__", [](MaskPointer* self, uintptr_t allowed, uintptr_t added, int64_t batch_stride,
                          int64_t head_stride, int64_t query_stride, bool causal) {
        new (self) MaskPointer{allowed, added, batch_stride, head_stride, query_stride, causal};
      });
  m.def("read", [](Bytes bytes, int threads) { return read_bytes(bytes.data(), bytes.size(), threads); }, "bytes"_a,
        "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("populate", &populate, "address"_a, "nbytes"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("write_tokens", &write_tokens, nb::kw_only(), "buffer"_a, "capacity"_a, "start"_a, "tokens"_a, "shape"_a,
        "strides"_a, "element_nbytes"_a);
  m.def("attend", &run_attend, nb::kw_only(), "plan"_a, "tail"_a, "keys"_a, "values"_a, "tail_shape"_a,
        "tail_tokens"_a, "query"_a, "form"_a, "shape"_a, "strides"_a, "tokens"_a, "mask"_a, "scale"_a, "softcap"_a,
        "out"_a, "lse"_a, "threads"_a, "isa"_a);
}

}  // namespace fibkv
