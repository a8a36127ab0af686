#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_native, module) {
  // An engine that a program keeps to its end is no leak, and what Python prints of it then alarms people for nothing.
  nanobind::set_leak_warnings(false);
  module.doc() = "The compiled part: attention of the host tier, its worker pool, memory and flags.";
  neo::bind_machine(module);
  neo::bind_memory(module);
  neo::bind_worker_pool(module);
  neo::bind_host_attention(module);
  neo::bind_driver_calls(module);
}
