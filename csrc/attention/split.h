// The work of a lap over its threads, decided once and used at every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention.h"

namespace neo {

// A (row, kv head) that several threads share. Its partial results lie in consecutive slots.
struct Cut {
  int32_t row;
  int32_t kv_head;
  int32_t first_slot;
  int32_t num_slots;
};

struct Split {
  std::vector<Item> items;            // thread by thread, in the order of attention
  std::vector<int32_t> thread_start;  // [num_threads + 1] into items
  std::vector<Cut> cuts;
  std::vector<int32_t> cut_of_slot;  // index into cuts
};

// Contiguous shares of the sequence (row, kv head, token) with equal bytes of K and V. A share ends at a block; it ends
// at a whole (row, kv head) where that moves the end by less than a cut would cost.
Split split_lap(const LapShape& shape, int num_threads);

}  // namespace neo
