// Faults caused on purpose, for tests of what happens then.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace neo {

enum class Fault { kNone, kThrow, kDie, kStall };

// At most one fault, for one worker at one task.
class FaultPlan {
 public:
  void set(Fault fault, int worker, uint32_t task) {
    const std::scoped_lock lock(mutex_);
    fault_ = fault;
    worker_ = worker;
    task_ = task;
    is_set_.store(true, std::memory_order_release);
  }

  // The fault that is due for this worker at this task; it happens once.
  Fault take(int worker, uint32_t task) {
    if (!is_set_.load(std::memory_order_acquire)) return Fault::kNone;
    const std::scoped_lock lock(mutex_);
    if (!is_set_ || worker != worker_ || task != task_) return Fault::kNone;
    is_set_ = false;
    return fault_;
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> is_set_{false};
  Fault fault_ = Fault::kNone;
  int worker_ = 0;
  uint32_t task_ = 0;
};

}  // namespace neo
