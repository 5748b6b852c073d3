// Work that threads share, piece by piece.
#pragma once

#include <atomic>
#include <thread>

namespace fibkv {

// Nobody waits for a thread that has not come yet, as at OpenMP's barriers: the system may take longer to wake it than
// the work takes.
class SharedWork {
 public:
  explicit SharedWork(int count) : count_(count) {}

  template <typename Visit>
  void work(Visit visit) {
    for (int i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
      visit(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  // Until the pieces that other threads have begun are done.
  void wait() const {
    while (done_.load(std::memory_order_acquire) < count_) std::this_thread::yield();
  }

 private:
  const int count_;
  std::atomic<int> next_{0}, done_{0};
};

}  // namespace fibkv
