// Whether other threads are worth waking: on a busy machine they come late, and a parallel region ends with the last.
#pragma once

#include <algorithm>

namespace fibkv {

// What one thread knows of those that help it. Where waiting for them took longer than its own work, its next calls do
// without: 8 of them at first, twice as many each time that it happens again, at most 128.
class Helpers {
 public:
  bool are_wanted() {
    if (without_ == 0) return true;
    --without_;
    return false;
  }

  // After a call with them: the seconds that its own work took, and those that it waited for theirs.
  void came(double worked, double waited) {
    constexpr double most = 0.5e-3;  // waking takes less on a machine at rest
    const bool were_late = waited > std::max(worked, most);
    pause_ = were_late ? std::clamp(2 * pause_, 8, 128) : 0;
    without_ = pause_;
  }

 private:
  int without_ = 0, pause_ = 0;
};

}  // namespace fibkv
