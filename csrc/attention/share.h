// What crosses from the lap into the files of one instruction set: plain data only. Those files are compiled with flags
// that the machine may not support, so nothing here has an inline function of which the linker could keep their copy.
#pragma once

#include "attention/attention.h"

namespace neo {

// A (row, kv head) that is attended in several items. Their partial results lie in consecutive slots.
struct Cut {
  int32_t row;
  int32_t kv_head;
  int32_t first_slot;
  int32_t num_slots;
};

// What one thread does at one layer: the items that `claim` gives it, in that order.
struct Share {
  const LapShape* lap;
  const LayerMemory* memory;
  float* partials;  // slots of partial_floats() each; see Item::partial
  void* scratch;    // scratch_bytes() for this thread alone, aligned to 64 bytes

  void* context;                        // of the two functions
  const Item* (*claim)(void* context);  // an item to attend next, or null when there are none any more
  const Cut* (*finish)(void* context, const Item& item);  // to be told of each item; returns what to merge, or null
};

using AttendFunction = void (*)(const Share&);

struct Policy {
  const char* name;
  bool (*runs_here)();
  AttendFunction (*find)(DType dtype, int head_dim);  // null for a head dim that is not supported
};

extern const Policy kPortablePolicy;
#if defined(__x86_64__)
extern const Policy kAvx2Policy;
extern const Policy kAvx512Policy;
extern const Policy kAmxPolicy;
#endif

// A partial result, all float: [group][head_dim] weighted sums of V, [group] maxima of the scores in log2 units,
// [group] sums of the weights relative to that maximum.
int64_t partial_floats(const Geometry& geometry);
int64_t scratch_bytes(const Geometry& geometry);

}  // namespace neo
