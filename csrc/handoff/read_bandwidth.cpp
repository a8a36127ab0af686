#include "handoff/read_bandwidth.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "base/host_memory.h"

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

// Step 0 writes the memory, so that it is there and near its reader; later steps read it.
class Streaming : public Work {
 public:
  Streaming(size_t num_bytes, int num_workers)
      : memory_(num_bytes, /*huge_pages=*/true, /*touch_cpus=*/{}), num_workers_(num_workers) {}

  void run(int worker, int step) override {
    const size_t share = memory_.num_bytes() / static_cast<size_t>(num_workers_) / kLineBytes * kLineBytes;
    std::byte* first = memory_.data() + static_cast<size_t>(worker) * share;
    if (step == 0) {
      std::memset(first, worker + 1, share);
    } else {
      // Odd steps leave fetching ahead to the hardware.
      sum_.fetch_xor(stream(first, share, step % 2 == 1 ? 0 : kAheadBytes), std::memory_order_relaxed);
    }
  }

  void finished(int step, int64_t start_ns, int64_t end_ns) override {
    if (step != 0) best_ns_ = std::min(best_ns_, end_ns - start_ns);
  }

  std::string name(int) const override { return "the measurement of read bandwidth"; }

  int64_t best_ns() const { return best_ns_; }

 private:
  const HostMemory memory_;
  const int num_workers_;
  int64_t best_ns_ = std::numeric_limits<int64_t>::max();
  std::atomic<uint64_t> sum_{0};  // keeps the loads from being optimised away
};

}  // namespace

double read_bandwidth(WorkerPool& pool, size_t num_bytes, int repeats) {
  const size_t smallest = kLineBytes * static_cast<size_t>(pool.num_workers());
  if (num_bytes < smallest) {
    throw std::invalid_argument("num_bytes is " + std::to_string(num_bytes) + "; expected at least " +
                                std::to_string(smallest) + ", a cache line for each worker");
  }
  if (repeats < 1) throw std::invalid_argument("repeats is " + std::to_string(repeats) + "; expected at least 1");
  const auto streaming = std::make_shared<Streaming>(num_bytes, pool.num_workers());
  for (int step = 0; step <= 2 * repeats; ++step) pool.run(streaming, step);
  return static_cast<double>(num_bytes) / static_cast<double>(streaming->best_ns());
}

}  // namespace neo
