// Which CPUs this process may use.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace neo {

// CPUs that the process's affinity allows, ascending.
std::vector<int> affinity_cpus();

// The CPUs of `allowed` in the order in which to use them: first one of each physical core, then the cores' other
// hardware threads, each by NUMA node. Cut to the whole CPUs that the cgroup's quota pays for, one at least.
// Topology and quota are read from /sys and /proc under `root`; what is not there does not limit.
std::vector<int> allowed_cpus(const std::vector<int>& allowed, const std::filesystem::path& root = "/");

// Throws std::invalid_argument, with `name`, for no CPU at all, one named twice or one that affinity forbids.
void check_cpus(const std::vector<int>& cpus, const std::string& name);

// Binds the calling thread to `cpu`; whether the system agreed.
bool pin_this_thread(int cpu);

}  // namespace neo
