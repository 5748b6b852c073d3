#pragma once

#include <cstddef>
#include <cstdint>

namespace fibkv {

// Has the system put memory behind the whole pages of `nbytes` bytes of address space, which change nothing of what they
// hold. False where it cannot: memory then comes as it is written to.
bool populate(uintptr_t address, size_t nbytes);

}  // namespace fibkv
