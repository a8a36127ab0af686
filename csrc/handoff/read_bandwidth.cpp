#include "handoff/read_bandwidth.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "base/host_memory.h"

namespace neo {
namespace {

constexpr size_t kLineBytes = 64;

// The exclusive-or of all words: eight independent chains, so that only loads bound it.
uint64_t stream(const std::byte* data, size_t num_bytes) {
  std::array<uint64_t, kLineBytes / sizeof(uint64_t)> chains{};
  for (size_t offset = 0; offset < num_bytes; offset += kLineBytes) {
    std::array<uint64_t, chains.size()> line;
    std::memcpy(line.data(), data + offset, kLineBytes);
    for (size_t i = 0; i < chains.size(); ++i) chains[i] ^= line[i];
  }
  uint64_t all = 0;
  for (uint64_t chain : chains) all ^= chain;
  return all;
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
      sum_.fetch_xor(stream(first, share), std::memory_order_relaxed);
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
  for (int step = 0; step <= repeats; ++step) pool.run(streaming, step);
  return static_cast<double>(num_bytes) / static_cast<double>(streaming->best_ns());
}

}  // namespace neo
