// The work of a lap over its threads, decided once and used at every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/share.h"

namespace neo {

struct Split {
  std::vector<Item> items;            // thread by thread, in the order of attention
  std::vector<int32_t> thread_start;  // [num_threads + 1] into items
  std::vector<Cut> cuts;
  std::vector<int32_t> cut_of_slot;  // index into cuts
};

// Contiguous shares of the sequence (row, kv head, token) with equal bytes of K and V. A share ends at a block; it ends
// at a whole (row, kv head) where that moves the end by less than a cut would cost. Its items get smaller towards its
// end, so that threads that are done can take over from those that are late, and all end together.
Split split_lap(const LapShape& shape, int num_threads);

}  // namespace neo
