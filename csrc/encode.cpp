// The encoding kernels of one instruction set, by element type.
#include "encode.h"

#include "encode_fib.h"
#include "encode_klt.h"
#include "encode_means.h"
#include "encode_norms.h"
#include "encode_scaled.h"

namespace fibkv {
namespace FIBKV_ISA {

template <Element element>
static constexpr EncodeKernels kernels() {
  return {
      &scratch_bytes,
      &encode_rows<element>,
      &decode_rows<element>,
      &klt_scratch_bytes,
      &encode_klt_rows<element>,
      &decode_klt_rows<element>,
      &encode_scaled_rows<Int8, element>,
      &decode_scaled_rows<Int8, element>,
      &encode_scaled_rows<E4m3, element>,
      &decode_scaled_rows<E4m3, element>,
      &divide_channels<element>,
      &multiply_channels<element>,
      &mean_rows<element>,
      &subtract_from_rows<element>,
      &encode_norms,
      &decode_norms,
  };
}

extern const EncodeKernels encode_tables[3];
const EncodeKernels encode_tables[3] = {
    kernels<Element::f32>(),
    kernels<Element::f16>(),
    kernels<Element::bf16>(),
};

}  // namespace FIBKV_ISA
}  // namespace fibkv
