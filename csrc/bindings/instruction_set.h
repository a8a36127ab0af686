#pragma once

#include "attention/policy.h"

namespace neo {

// The best policy that runs here, or the one that the environment variable NEO_CPU_ISA names; throws
// std::invalid_argument if that one does not run here.
const Policy& chosen_policy();

}  // namespace neo
