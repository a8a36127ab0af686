// Flags: 32-bit words in memory that host and device share, each on a cache line of its own.
//
// A flag's value only grows, and wraps: `a` is at least `b` when the signed difference is not negative, which is how
// cuStreamWaitValue32 with CU_STREAM_WAIT_VALUE_GEQ compares too. A device that writes a flag wakes nobody, so whoever
// waits for one naps in between looks; a flag raised by this process ends the nap at once.
#pragma once

#include <atomic>
#include <cstdint>

#include "sync/futex.h"
#include "sync/spin.h"

namespace neo {

using FlagWord = std::atomic<uint32_t>;

// The flag at an address that came as a number; throws std::invalid_argument for null or one not 4-byte aligned.
FlagWord& flag_at(uintptr_t address, const char* name);

inline bool flag_reached(const FlagWord& flag, uint32_t value) {
  return static_cast<int32_t>(flag.load(std::memory_order_acquire) - value) >= 0;
}

// Sets the flag after all earlier writes of this thread; wakes nobody.
inline void flag_set(FlagWord& flag, uint32_t value) { flag.store(value, std::memory_order_release); }

// Sets the flag and wakes who naps on it.
inline void flag_raise(FlagWord& flag, uint32_t value) {
  flag_set(flag, value);
  futex_wake_all(flag);
}

// Waits until the flag is at least `value` or `abandoned()`: spins for `spin_ns`, then looks every
// `nap_ns`. Whether it was reached.
template <typename Abandoned>
bool flag_wait(const FlagWord& flag, uint32_t value, int64_t spin_ns, int64_t nap_ns, Abandoned abandoned) {
  if (spin_until([&] { return flag_reached(flag, value) || abandoned(); }, spin_ns)) return flag_reached(flag, value);
  while (true) {
    const uint32_t seen = flag.load(std::memory_order_acquire);
    if (static_cast<int32_t>(seen - value) >= 0) return true;
    if (abandoned()) return false;
    futex_wait(flag, seen, nap_ns);
  }
}

// Waits until the flag is at least `value`; false when `timeout_s` has passed.
bool flag_wait_for(const FlagWord& flag, uint32_t value, double timeout_s);

}  // namespace neo
