// Flags and host memory.
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/host_memory.h"
#include "bindings/bindings.h"
#include "sync/flag.h"

namespace neo {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

void construct_memory(HostMemory* memory, int64_t num_bytes, bool huge_pages, const std::vector<int>& touch_cpus) {
  if (num_bytes < 1) {
    throw std::invalid_argument("num_bytes is " + std::to_string(num_bytes) + "; expected at least 1");
  }
  new (memory) HostMemory(static_cast<size_t>(num_bytes), huge_pages, touch_cpus);
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> memory_array(nb::handle_t<HostMemory> self) {
  const auto& memory = nb::cast<const HostMemory&>(self);
  return {memory.data(), {memory.num_bytes()}, self};
}

}  // namespace

void bind_memory(nb::module_& module) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const OutOfHostMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });

  module.def(
      "flag_read", [](uintptr_t address) { return flag_at(address, "address").load(std::memory_order_acquire); },
      "address"_a);
  module.def(
      "flag_raise", [](uintptr_t address, uint32_t value) { flag_raise(flag_at(address, "address"), value); },
      "address"_a, "value"_a);
  module.def(
      "flag_wait",
      [](uintptr_t address, uint32_t value, double timeout_s) {
        const FlagWord& flag = flag_at(address, "address");
        if (flag_reached(flag, value)) return true;
        const nb::gil_scoped_release no_gil;
        return flag_wait_for(flag, value, timeout_s);
      },
      "address"_a, "value"_a, "timeout_s"_a);

  nb::class_<HostMemory>(module, "HostMemory")
      .def("__init__", &construct_memory, "num_bytes"_a, nb::kw_only(), "huge_pages"_a = true,
           "touch_cpus"_a = std::vector<int>{}, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("address", [](const HostMemory& memory) { return reinterpret_cast<uintptr_t>(memory.data()); })
      .def_prop_ro("num_bytes", &HostMemory::num_bytes)
      .def("array", &memory_array);
}

}  // namespace neo
