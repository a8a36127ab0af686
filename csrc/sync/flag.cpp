#include "sync/flag.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace neo {

FlagWord& flag_at(uintptr_t address, const char* name) {
  if (address == 0 || address % alignof(FlagWord) != 0) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(address) +
                                "; expected the address of a 32-bit flag, aligned to 4 bytes");
  }
  return *reinterpret_cast<FlagWord*>(address);
}

bool flag_wait_for(const FlagWord& flag, uint32_t value, double timeout_s) {
  constexpr int64_t kSpinNs = 20'000;
  constexpr int64_t kNapNs = 1'000'000;  // the flag of a device is seen late; who is in a hurry is a worker
  constexpr double kLongestS = 1e9;      // what fits into 64 bits of nanoseconds, and then some
  const auto timeout_ns = static_cast<int64_t>(std::clamp(timeout_s, 0.0, kLongestS) * 1e9);
  const int64_t stop_ns = monotonic_ns() + timeout_ns;
  return flag_wait(flag, value, std::min(kSpinNs, timeout_ns), std::min(kNapNs, timeout_ns),
                   [&] { return monotonic_ns() >= stop_ns; });
}

}  // namespace neo
