#include "attention/policy.h"

#include <stdexcept>
#include <string>

namespace neo {

std::vector<const Policy*> available_policies() {
  static const std::vector<const Policy*> available = [] {
    std::vector<const Policy*> result;
    for (const Policy* policy : {
#if defined(__x86_64__)
             &kAmxPolicy, &kAvx512Policy, &kAvx2Policy,
#endif
             &kPortablePolicy}) {
      if (policy->runs_here()) result.push_back(policy);
    }
    return result;
  }();
  return available;
}

const Policy& find_policy(std::string_view name) {
  std::string names;
  for (const Policy* policy : available_policies()) {
    if (policy->name == name) return *policy;
    names += names.empty() ? policy->name : std::string(", ") + policy->name;
  }
  throw std::invalid_argument("instruction set \"" + std::string(name) + "\" cannot run here; expected one of " +
                              names);
}

}  // namespace neo
