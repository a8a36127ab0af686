// Which CPUs are chosen, on machines made of files.
#include "sync/topology.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/check.h"

namespace {

namespace fs = std::filesystem;

// A directory with the files of /sys and /proc that the choice reads, removed with the object.
class Machine {
 public:
  Machine() : root_(fs::temp_directory_path() / ("neo-topology-" + std::to_string(::getpid()))) {
    fs::remove_all(root_);
  }
  ~Machine() { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) const {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text << '\n';
  }

  void add_cpu(int cpu, int package, int core) const {
    const std::string topology = "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    write(topology + "physical_package_id", std::to_string(package));
    write(topology + "core_id", std::to_string(core));
  }

  const fs::path& root() const { return root_; }

 private:
  fs::path root_;
};

void expect(const Machine& machine, const std::vector<int>& allowed, const std::vector<int>& expected,
            const char* what) {
  CHECK(neo::allowed_cpus(allowed, machine.root()) == expected, "%s", what);
}

// Two sockets, two cores each, two hardware threads each; the threads of a core are 4 CPUs apart.
Machine& add_two_sockets(Machine& machine) {
  for (int cpu = 0; cpu < 8; ++cpu) machine.add_cpu(cpu, cpu % 2, cpu / 2 % 2);
  machine.write("sys/devices/system/node/node0/cpulist", "0,2,4,6");
  machine.write("sys/devices/system/node/node1/cpulist", "1,3,5,7");
  machine.write("sys/devices/system/node/possible", "0-1");
  return machine;
}

const std::vector<int> kAll{0, 1, 2, 3, 4, 5, 6, 7};

void test_order() {
  Machine machine;
  expect(machine, {0, 1, 2}, {0, 1, 2}, "a system that says nothing limits nothing");
  add_two_sockets(machine);
  expect(machine, kAll, {0, 2, 1, 3, 4, 6, 5, 7}, "physical cores first, by node");
  expect(machine, {0, 4, 5, 6, 7}, {0, 6, 5, 7, 4}, "cores of which one thread is allowed, and one with two");
}

void test_cgroup_v2() {
  Machine machine;
  add_two_sockets(machine).write("proc/self/cgroup", "0::/outer/inner");
  machine.write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000");
  expect(machine, kAll, {0, 2, 1, 3, 4, 6, 5, 7}, "max is no limit");
  machine.write("sys/fs/cgroup/outer/cpu.max", "350000 100000");
  expect(machine, kAll, {0, 2, 1}, "3.5 CPUs of the outer group pay for 3");
  machine.write("sys/fs/cgroup/outer/inner/cpu.max", "50000 100000");
  expect(machine, kAll, {0}, "half a CPU is still one");
}

void test_cgroup_v1() {
  Machine machine;
  add_two_sockets(machine).write("proc/self/cgroup", "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/");
  machine.write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "-1");
  machine.write("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000");
  expect(machine, kAll, {0, 2, 1, 3, 4, 6, 5, 7}, "-1 is no limit");
  machine.write("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "200000");
  expect(machine, kAll, {0, 2}, "2 CPUs");
}

void test_this_machine() {
  const std::vector<int> affinity = neo::affinity_cpus();
  CHECK(!affinity.empty(), "at least the CPU that this runs on");
  CHECK(neo::allowed_cpus(affinity).size() <= affinity.size(), "no more than affinity allows");
}

}  // namespace

int main() {
  test_order();
  test_cgroup_v2();
  test_cgroup_v1();
  test_this_machine();
  return failed_checks == 0 ? 0 : 1;
}
