// How fast the workers of a pool can read memory: the limit of decode attention.
#pragma once

#include <cstddef>

#include "handoff/worker_pool.h"

namespace neo {

// GB/s (10^9) at which the workers together stream plain loads over `num_bytes` at `data`, each over its own part; the
// best of `repeats`. Throws std::invalid_argument, or the pool's error.
double read_bandwidth(WorkerPool& pool, const std::byte* data, size_t num_bytes, int repeats);

}  // namespace neo
