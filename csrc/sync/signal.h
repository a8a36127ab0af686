// A counter that some threads advance and others wait for, spinning first and then sleeping.
#pragma once

#include <atomic>
#include <cstdint>

namespace neo {

class alignas(64) Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  // Adds one, after all earlier writes of this thread, and wakes who sleeps: a system call only if someone does.
  void advance();

  // Waits while the counter is `seen`: spins for `spin_ns`, then sleeps, `timeout_ns` at most (negative: without end).
  // Whether the counter has moved on.
  bool wait_past(uint32_t seen, int64_t spin_ns, int64_t timeout_ns = -1);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace neo
