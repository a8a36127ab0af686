#include "handoff/worker_pool.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "handoff/read_bandwidth.h"

namespace neo {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

void construct(WorkerPool* pool, const std::vector<int>& cpus, double spin_us, double nap_us, double deadline_s) {
  new (pool) WorkerPool(cpus, {.spin_us = spin_us, .nap_us = nap_us, .deadline_s = deadline_s});
}

void inject_fault(WorkerPool& pool, const std::string& kind, int after_tasks, int worker) {
  const auto fault = kind == "throw"   ? Fault::kThrow
                     : kind == "die"   ? Fault::kDie
                     : kind == "stall" ? Fault::kStall
                                       : Fault::kNone;
  if (fault == Fault::kNone) {
    throw std::invalid_argument("kind is \"" + kind + "\"; expected throw, die or stall");
  }
  pool.inject_fault(fault, worker, after_tasks);
}

double measure_read_bandwidth(WorkerPool& pool, uintptr_t address, int64_t num_bytes, int repeats) {
  if (num_bytes < 1) {
    throw std::invalid_argument("num_bytes is " + std::to_string(num_bytes) + "; expected at least 1");
  }
  return read_bandwidth(pool, reinterpret_cast<const std::byte*>(address), static_cast<size_t>(num_bytes), repeats);
}

}  // namespace

void bind_worker_pool(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> without_gil;
  const WorkerPool::Options defaults;
  nb::class_<WorkerPool>(module, "WorkerPool")
      .def("__init__", &construct, "cpus"_a, nb::kw_only(), "spin_us"_a = defaults.spin_us,
           "nap_us"_a = defaults.nap_us, "deadline_s"_a = defaults.deadline_s, without_gil)
      .def_prop_ro("num_workers", &WorkerPool::num_workers)
      .def("error", &WorkerPool::error)
      .def("clear_error", &WorkerPool::clear_error, without_gil)
      .def("read_bandwidth", &measure_read_bandwidth, "address"_a, "num_bytes"_a, "repeats"_a = 3, without_gil)
      .def("inject_fault", &inject_fault, "kind"_a, nb::kw_only(), "after_tasks"_a = 0, "worker"_a = -1)
      .def("close", &WorkerPool::close, without_gil);
}

}  // namespace neo
