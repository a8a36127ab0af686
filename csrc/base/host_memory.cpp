#include "base/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>

#include "sync/topology.h"

namespace neo {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kHugePageBytes = size_t{2} << 20;

// Writes one byte of every page of [first, stop); the memory is zero before and after.
void touch(std::byte* first, std::byte* stop) {
  for (volatile std::byte* page = first; page < stop; page += kPageBytes) *page = std::byte{0};
}

void touch_in_parallel(std::byte* data, size_t num_bytes, const std::vector<int>& cpus) {
  const size_t num_pages = (num_bytes + kHugePageBytes - 1) / kHugePageBytes;
  const size_t share = (num_pages + cpus.size() - 1) / cpus.size() * kHugePageBytes;
  std::vector<std::jthread> threads;
  for (size_t i = 0; i < cpus.size(); ++i) {
    std::byte* first = data + std::min(num_bytes, i * share);
    std::byte* stop = data + std::min(num_bytes, (i + 1) * share);
    threads.emplace_back([cpu = cpus[i], first, stop] {
      pin_this_thread(cpu);
      touch(first, stop);
    });
  }
}

}  // namespace

HostMemory::HostMemory(size_t num_bytes, bool huge_pages, const std::vector<int>& touch_cpus)
    : mapping_bytes_(num_bytes + kHugePageBytes), num_bytes_(num_bytes) {
  if (num_bytes == 0) throw std::invalid_argument("num_bytes is 0; expected at least 1");
  if (!touch_cpus.empty()) check_cpus(touch_cpus, "touch_cpus");
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    throw OutOfHostMemory("the system does not give " + std::to_string(num_bytes) +
                          " bytes of host memory: " + std::strerror(errno));
  }
  const auto address = reinterpret_cast<uintptr_t>(mapping_);
  data_ = static_cast<std::byte*>(mapping_) + ((kHugePageBytes - address % kHugePageBytes) % kHugePageBytes);
  // Advice only: a system without transparent huge pages refuses it and serves small pages.
  madvise(data_, num_bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  if (!touch_cpus.empty()) touch_in_parallel(data_, num_bytes, touch_cpus);
}

HostMemory::~HostMemory() { munmap(mapping_, mapping_bytes_); }

}  // namespace neo
