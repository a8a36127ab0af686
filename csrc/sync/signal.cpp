#include "sync/signal.h"

#include "sync/futex.h"
#include "sync/spin.h"

namespace neo {

// advance() writes the counter, then reads the sleepers; wait_past() writes the sleepers, then reads the counter (in
// the kernel). Sequential consistency makes one of them see the other.
void Signal::advance() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(value_);
}

bool Signal::wait_past(uint32_t seen, int64_t spin_ns, int64_t timeout_ns) {
  if (spin_until([&] { return value() != seen; }, spin_ns)) return true;
  const int64_t stop_ns = timeout_ns < 0 ? 0 : monotonic_ns() + timeout_ns;
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == seen) {
    const int64_t left_ns = timeout_ns < 0 ? -1 : stop_ns - monotonic_ns();
    if (timeout_ns >= 0 && left_ns <= 0) break;
    futex_wait(value_, seen, left_ns);
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return value() != seen;
}

}  // namespace neo
