// Kernels that score and mix on the codes in integer arithmetic: offered by instruction sets that have byte products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attend_kernels.h"

namespace fibkv {
namespace FIBKV_ISA {

// Whether that pays for any number of queries: where it does not, many are worth decoding a tile once.
bool integer_always(const Side& side);

// As the functions of AttendKernels of the same names, for sides with integer tables (`planes` > 0) in tile order.
size_t integer_prepared_bytes(const Side& key, int n);
void integer_prepare(const Side& key, const float* queries, int n, uint8_t* prepared);
// `norms` [kTile]: factors of the keys. `shifts` [n]: added to all logits of a query.
void integer_score(const Side& key, const Span& span, int first, int tokens, const uint8_t* prepared, int n,
                   const float* norms, const float* shifts, float* logits, const uint8_t* ahead);
// `norms` [kTile]: factors of the values. `out` is in plane order: [planes][code bytes], coordinate byte * planes + plane.
void integer_mix(const Side& value, const Span& span, int first, int tokens, const float* weights, int n,
                 const float* norms, float* out, const uint8_t* ahead);

}  // namespace FIBKV_ISA
}  // namespace fibkv
