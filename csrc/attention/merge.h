// Partial results of one (row, kv head) into its output.
#pragma once

#include "attention/share.h"
#include "attention/split.h"

namespace neo {

void merge_partials(const LapShape& lap, const LayerMemory& memory, const Cut& cut, const float* partials);

}  // namespace neo
