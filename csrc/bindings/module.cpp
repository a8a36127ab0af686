#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_native, module) {
  module.doc() = "The compiled part: attention of the host tier, its worker pool, memory and flags.";
  neo::bind_machine(module);
  neo::bind_memory(module);
  neo::bind_worker_pool(module);
  neo::bind_host_attention(module);
}
