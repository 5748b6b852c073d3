#include "bindings.h"

namespace fibkv {

void bind_encoding(nanobind::module_&) {}

}  // namespace fibkv
