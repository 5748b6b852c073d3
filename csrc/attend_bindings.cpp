#include "bindings.h"

namespace fibkv {

void bind_attention(nanobind::module_&) {}

}  // namespace fibkv
