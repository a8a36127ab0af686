// The choice among the instruction sets that attention is compiled for.
#pragma once

#include <string_view>
#include <vector>

#include "attention/share.h"

namespace neo {

// Those that run here, best first: amx, avx512, avx2, portable.
std::vector<const Policy*> available_policies();

// Throws std::invalid_argument that names what does run here if `name` does not.
const Policy& find_policy(std::string_view name);

}  // namespace neo
