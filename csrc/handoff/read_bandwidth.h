// How fast the workers of a pool can read memory: the limit of decode attention.
#pragma once

#include <cstddef>

#include "handoff/worker_pool.h"

namespace neo {

// GB/s (10^9) at which the workers together stream plain loads over `num_bytes` of fresh memory on huge pages, each
// over its own part; the best of `repeats`. Throws std::invalid_argument, OutOfHostMemory, or the pool's error.
double read_bandwidth(WorkerPool& pool, size_t num_bytes, int repeats);

}  // namespace neo
