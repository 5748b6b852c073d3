#include "populate.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fibkv {

#if defined(__linux__)
bool populate(uintptr_t address, size_t nbytes) {
  // Of Linux 5.14; headers may be older.
  constexpr int kPopulateForWriting = 23;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (address + page - 1) / page * page, last = (address + nbytes) / page * page;
  return first >= last || madvise(reinterpret_cast<void*>(first), last - first, kPopulateForWriting) == 0;
}
#else
bool populate(uintptr_t, size_t) { return false; }
#endif

}  // namespace fibkv
