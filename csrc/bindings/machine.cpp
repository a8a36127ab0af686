// What this machine offers: instruction sets and CPUs.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "attention/policy.h"
#include "bindings/bindings.h"
#include "bindings/instruction_set.h"
#include "sync/topology.h"

namespace neo {

const Policy& chosen_policy() {
  const char* name = std::getenv("NEO_CPU_ISA");
  return name == nullptr || *name == '\0' ? *available_policies().front() : find_policy(name);
}

void bind_machine(nanobind::module_& module) {
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Policy* policy : available_policies()) names.emplace_back(policy->name);
    return names;
  });
  module.def("default_instruction_set", [] { return std::string(chosen_policy().name); });
  module.def("allowed_cpus", [] { return allowed_cpus(affinity_cpus()); });
}

}  // namespace neo
