#include "sync/topology.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace neo {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxCpus = 8192;  // the most that Linux can be built for
using CpuMask = std::array<cpu_set_t, kMaxCpus / CPU_SETSIZE>;

// The lines of a file that the kernel writes; none if it is not there. No streams, for the reason in base/decimal.h.
std::vector<std::string> read_lines(const fs::path& path) {
  std::vector<std::string> lines;
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (!file) return lines;
  bool begins = true;
  for (char part[512]; std::fgets(part, sizeof part, file);) {
    std::string text = part;
    const bool ends = text.back() == '\n';
    if (ends) text.pop_back();
    if (begins) lines.emplace_back();
    lines.back() += text;
    begins = ends;
  }
  std::fclose(file);
  return lines;
}

std::string first_line(const fs::path& path) {
  const std::vector<std::string> lines = read_lines(path);
  return lines.empty() ? std::string() : lines.front();
}

// The numbers of a kernel list such as "0-3,8,10-11". Here and below no stream parses numbers: that takes the facets of
// a locale, which are not usable where libstdc++ is linked into this module a second time.
std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    int first = 0;
    auto [next, error] = std::from_chars(at, end, first);
    if (error != std::errc{}) break;
    int last = first;
    if (next != end && *next == '-') next = std::from_chars(next + 1, end, last).ptr;
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    at = next != end && *next == ',' ? next + 1 : end;
  }
  return cpus;
}

std::map<int, int> node_of_cpu(const fs::path& root) {
  std::map<int, int> nodes;
  std::error_code missing;
  for (const auto& entry : fs::directory_iterator(root / "sys/devices/system/node", missing)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with("node") || name.size() == 4 || !std::isdigit(static_cast<unsigned char>(name[4]))) continue;
    for (int cpu : parse_cpu_list(first_line(entry.path() / "cpulist"))) nodes[cpu] = std::stoi(name.substr(4));
  }
  return nodes;
}

// CPUs that a quota of `quota` microseconds in each `period` pays for; a quota of "max" or -1 does not limit.
double quota_cpus(const std::string& quota, const std::string& period) {
  const double quota_us = std::strtod(quota.c_str(), nullptr), period_us = std::strtod(period.c_str(), nullptr);
  if (quota_us <= 0 || period_us <= 0) return std::numeric_limits<double>::infinity();
  return quota_us / period_us;
}

double cgroup_v2_cpus(const fs::path& directory) {
  const std::string line = first_line(directory / "cpu.max");  // "<quota> <period>"
  const size_t space = line.find(' ');
  return space == std::string::npos ? quota_cpus("max", "") : quota_cpus(line.substr(0, space), line.substr(space + 1));
}

double cgroup_v1_cpus(const fs::path& directory) {
  return quota_cpus(first_line(directory / "cpu.cfs_quota_us"), first_line(directory / "cpu.cfs_period_us"));
}

// The tightest quota of the process's cgroups and their ancestors. A line of /proc/self/cgroup is
// "<id>:<controllers>:<path>", without controllers for version 2.
double cgroup_cpus(const fs::path& root) {
  double cpus = std::numeric_limits<double>::infinity();
  for (const std::string& line : read_lines(root / "proc/self/cgroup")) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool is_v2 = controllers == ",,";
    if (!is_v2 && controllers.find(",cpu,") == std::string::npos) continue;
    const fs::path mount = root / (is_v2 ? "sys/fs/cgroup" : "sys/fs/cgroup/cpu");
    for (fs::path group = fs::path(line.substr(second + 1)).relative_path();; group = group.parent_path()) {
      cpus = std::min(cpus, is_v2 ? cgroup_v2_cpus(mount / group) : cgroup_v1_cpus(mount / group));
      if (group.empty()) break;
    }
  }
  return cpus;
}

}  // namespace

std::vector<int> affinity_cpus() {
  CpuMask mask{};
  if (sched_getaffinity(0, sizeof(mask), mask.data()) != 0) {
    throw std::runtime_error("the system does not say which CPUs this process may use (sched_getaffinity)");
  }
  std::vector<int> cpus;
  for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
    if (CPU_ISSET_S(cpu, sizeof(mask), mask.data())) cpus.push_back(cpu);
  }
  return cpus;
}

void check_cpus(const std::vector<int>& cpus, const std::string& name) {
  if (cpus.empty()) throw std::invalid_argument(name + " is empty; expected at least one CPU");
  const std::vector<int> allowed = affinity_cpus();
  for (size_t i = 0; i < cpus.size(); ++i) {
    if (std::find(allowed.begin(), allowed.end(), cpus[i]) == allowed.end()) {
      throw std::invalid_argument(name + " holds CPU " + std::to_string(cpus[i]) +
                                  ", which this process may not use; allowed_cpus() lists those that it may");
    }
    if (std::find(cpus.begin(), cpus.begin() + static_cast<std::ptrdiff_t>(i), cpus[i]) !=
        cpus.begin() + static_cast<std::ptrdiff_t>(i)) {
      throw std::invalid_argument(name + " holds CPU " + std::to_string(cpus[i]) + " twice; expected each CPU once");
    }
  }
}

bool pin_this_thread(int cpu) {
  CpuMask mask{};
  CPU_SET_S(cpu, sizeof(mask), mask.data());
  return sched_setaffinity(0, sizeof(mask), mask.data()) == 0;
}

std::vector<int> allowed_cpus(const std::vector<int>& allowed, const fs::path& root) {
  const std::map<int, int> nodes = node_of_cpu(root);
  std::map<std::pair<std::string, std::string>, int> threads_of_core;
  std::vector<std::tuple<int, int, int>> order;  // (hardware thread of its core, NUMA node, CPU)
  for (int cpu : allowed) {
    const fs::path topology = root / "sys/devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "topology";
    const std::string core = first_line(topology / "core_id");
    const int thread = core.empty() ? 0 : threads_of_core[{first_line(topology / "physical_package_id"), core}]++;
    const auto node = nodes.find(cpu);
    order.emplace_back(thread, node == nodes.end() ? 0 : node->second, cpu);
  }
  std::sort(order.begin(), order.end());
  const double paid_for = std::max(1.0, cgroup_cpus(root));
  if (static_cast<double>(order.size()) > paid_for) order.resize(static_cast<size_t>(paid_for));
  std::vector<int> cpus;
  for (const auto& entry : order) cpus.push_back(std::get<2>(entry));
  return cpus;
}

}  // namespace neo
