// Waiting without giving up the CPU.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <time.h>

#include <cstdint>

namespace neo {

// Tells the core that this is a spin loop.
inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Nanoseconds of CLOCK_MONOTONIC, the clock of Python's time.monotonic_ns.
inline int64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// Spins until `condition` holds or `spin_ns` have passed; whether it holds.
template <typename Condition>
bool spin_until(Condition condition, int64_t spin_ns) {
  constexpr int kPausesPerClockRead = 16;
  if (condition()) return true;
  const int64_t stop_ns = monotonic_ns() + spin_ns;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      cpu_pause();
      if (condition()) return true;
    }
  } while (monotonic_ns() < stop_ns);
  return false;
}

}  // namespace neo
