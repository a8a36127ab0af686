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

// What every 64-bit machine loads with one instruction. A wider one, or an array of words, is more than some compilers
// keep in registers, and then this would measure their stack.
using Words [[gnu::vector_size(16), gnu::may_alias]] = uint64_t;
constexpr size_t kLineBytes = 4 * sizeof(Words);

// The exclusive-or of all words, in four chains: nothing but loads bounds it.
uint64_t stream(const std::byte* data, size_t num_bytes) {
  Words a{}, b{}, c{}, d{};
  for (size_t offset = 0; offset < num_bytes; offset += kLineBytes) {
    const auto* line = reinterpret_cast<const Words*>(data + offset);
    a ^= line[0];
    b ^= line[1];
    c ^= line[2];
    d ^= line[3];
  }
  const Words all = a ^ b ^ c ^ d;
  return all[0] ^ all[1];
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
