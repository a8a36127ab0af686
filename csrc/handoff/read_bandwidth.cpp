#include "handoff/read_bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace neo {
namespace {

constexpr size_t kLineBytes = 64;
constexpr size_t kAheadBytes = 8 << 10;

// The exclusive-or of all words, in independent chains, so that only loads bound it. With `ahead` > 0 each line is also
// prefetched so many bytes before its turn: hardware that fetches ahead too timidly would set the limit too low.
template <typename Word>
[[gnu::always_inline]] inline uint64_t stream_words(const std::byte* data, size_t num_bytes, size_t ahead) {
  Word chains[4] = {};
  for (size_t offset = 0; offset + sizeof(chains) <= num_bytes; offset += sizeof(chains)) {
    if (ahead > 0) {
      for (size_t line = 0; line < sizeof(chains); line += kLineBytes) {
        __builtin_prefetch(data + std::min(offset + line + ahead, num_bytes - 1));
      }
    }
    const auto* words = reinterpret_cast<const Word*>(data + offset);
    for (size_t i = 0; i < 4; ++i) chains[i] ^= words[i];
  }
  const Word all = chains[0] ^ chains[1] ^ chains[2] ^ chains[3];
  uint64_t first;
  std::memcpy(&first, &all, sizeof(first));
  return first;
}

using Wide = uint64_t __attribute__((vector_size(32), may_alias));

#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t stream_avx2(const std::byte* data, size_t num_bytes, size_t ahead) {
  return stream_words<Wide>(data, num_bytes, ahead);
}
#endif

uint64_t stream(const std::byte* data, size_t num_bytes, size_t ahead) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return stream_avx2(data, num_bytes, ahead);
#endif
  using Narrow = uint64_t __attribute__((vector_size(16), may_alias));
  return stream_words<Narrow>(data, num_bytes, ahead);
}

class Streaming : public Work {
 public:
  Streaming(const std::byte* data, size_t num_bytes, int num_workers)
      : data_(data), share_(num_bytes / static_cast<size_t>(num_workers) / kLineBytes * kLineBytes) {}

  void run(int worker, int step) override {
    // Even steps leave fetching ahead to the hardware.
    const size_t ahead = step % 2 == 0 ? 0 : kAheadBytes;
    sum_.fetch_xor(stream(data_ + static_cast<size_t>(worker) * share_, share_, ahead), std::memory_order_relaxed);
  }

  void finished(int, int64_t start_ns, int64_t end_ns) override { best_ns_ = std::min(best_ns_, end_ns - start_ns); }

  std::string name(int) const override { return "the measurement of read bandwidth"; }

  int64_t best_ns() const { return best_ns_; }

 private:
  const std::byte* const data_;
  const size_t share_;
  int64_t best_ns_ = std::numeric_limits<int64_t>::max();
  std::atomic<uint64_t> sum_{0};  // keeps the loads from being optimised away
};

}  // namespace

double read_bandwidth(WorkerPool& pool, const std::byte* data, size_t num_bytes, int repeats) {
  if (data == nullptr) throw std::invalid_argument("address is 0; expected the address of the memory to read");
  const size_t smallest = kLineBytes * static_cast<size_t>(pool.num_workers());
  if (num_bytes < smallest) {
    throw std::invalid_argument("num_bytes is " + std::to_string(num_bytes) + "; expected at least " +
                                std::to_string(smallest) + ", a cache line for each worker");
  }
  if (repeats < 1) throw std::invalid_argument("repeats is " + std::to_string(repeats) + "; expected at least 1");
  const auto streaming = std::make_shared<Streaming>(data, num_bytes, pool.num_workers());
  for (int step = 0; step < 2 * repeats; ++step) pool.run(streaming, step);
  return static_cast<double>(num_bytes) / static_cast<double>(streaming->best_ns());
}

}  // namespace neo
