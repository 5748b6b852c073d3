// Whether other threads are worth waking: on a busy machine they come late, and a parallel region ends with the last.
#pragma once

#include <algorithm>

namespace fibkv {

// What one thread knows of those that help it. Where a call took longer than its work would have alone, the next calls
// do without them: 8 calls at first, twice as many each time that it happens again, at most 128.
class Helpers {
 public:
  bool are_wanted() {
    if (without_ == 0) return true;
    --without_;
    return false;
  }

  // After a call with them: the seconds that it took, those that its own thread worked, and those that all of them did.
  void came(double took, double own, double all) {
    constexpr double most = 0.5e-3;  // waking takes less on a machine at rest
    const bool were_late = took - own > most && took > all;
    pause_ = were_late ? std::clamp(2 * pause_, 8, 128) : 0;
    without_ = pause_;
  }

 private:
  int without_ = 0, pause_ = 0;
};

}  // namespace fibkv
