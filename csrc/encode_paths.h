// Trellis codes: kShorts vectors from memory to codes.
#pragma once

#include "encode_fit.h"
#include "encode_trellis.h"

namespace fibkv {
namespace FIBKV_ISA {

// Up to kShorts rows of a trellis code: all that is float in two halves, the search for paths in one.
template <Element element>
static bool encode_paths(const FibForm& form, const typename Format<element>::stored* rows, int count, uint8_t* codes,
                         double* norms, const FibScratch (&halves)[2], const PathScratch& paths) {
  Wide length[2];
  Best best[2];
  const int counts[2] = {count < kLanes ? count : kLanes, count < kLanes ? 0 : count - kLanes};
  for (int h = 0; h < 2; ++h) {
    if (!counts[h]) {
      for (int i = 0; i < form.dim; ++i) halves[h].unit[i] = vf{};
    } else if (!rotate_exactly<element>(form, rows + h * kLanes * form.dim, counts[h], halves[h], length[h])) {
      return false;
    }
  }
  for (int s = 0; s < form.num_scales; ++s) {
    for (int h = 0; h < 2; ++h) set_points(form, halves[h].unit, form.scales[s], h, paths.points);
    search_paths(form, paths, halves[0].index, halves[1].index);
    for (int h = 0; h < 2; ++h) {
      open_windows(form, halves[h].index);
      best[h].offer(form, halves[h]);
    }
  }
  for (int h = 0; h < 2; ++h) {
    const int first = h * kLanes;
    write_batch(form, halves[h].best, length[h], best[h].fit, counts[h], codes + (int64_t)first * form.code_bytes(),
                norms + first, halves[h].words);
  }
  return true;
}

template <Element element>
static bool encode_all_paths(const FibForm& form, const typename Format<element>::stored* rows, int64_t count,
                             uint8_t* codes, double* norms, void* memory) {
  vf* const start = static_cast<vf*>(memory);
  const size_t each = FibScratch::registers(form);
  const FibScratch halves[2] = {{form, start}, {form, start + each}};
  const PathScratch paths(form, reinterpret_cast<vs*>(start + 2 * each));
  for (int64_t first = 0; first < count; first += kShorts) {
    const int some = count - first < kShorts ? (int)(count - first) : kShorts;
    if (!encode_paths<element>(form, rows + first * form.dim, some, codes + first * form.code_bytes(), norms + first,
                               halves, paths)) {
      return false;
    }
  }
  return true;
}

}  // namespace FIBKV_ISA
}  // namespace fibkv
