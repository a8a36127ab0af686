// Memory of the host tier.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <vector>

namespace neo {

class OutOfHostMemory : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Zeroed anonymous memory, aligned to 2 MiB, on huge pages where the system gives them.
class HostMemory {
 public:
  // With `touch_cpus`, one thread on each of these CPUs touches a part of the pages now, so that they lie near those
  // CPUs and no page fault comes later; without, pages come on first use. Throws OutOfHostMemory.
  HostMemory(size_t num_bytes, bool huge_pages, const std::vector<int>& touch_cpus);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  void* mapping_;
  size_t mapping_bytes_;
  std::byte* data_;
  size_t num_bytes_;
};

}  // namespace neo
