// The parts of the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace fibkv {

void bind_attention(nanobind::module_& m);
void bind_encoding(nanobind::module_& m);

}  // namespace fibkv
