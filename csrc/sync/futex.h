// Sleeping on a 32-bit word (Linux futex, private to the process).
#pragma once

#include <atomic>
#include <cstdint>

namespace neo {

// Sleeps while `word` holds `expected`, for at most `timeout_ns` (negative: without end). May return early.
void futex_wait(const std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_ns);

// Wakes every thread that sleeps on `word`. The word may be gone by then: only its address is used.
void futex_wake_all(const std::atomic<uint32_t>& word);

}  // namespace neo
