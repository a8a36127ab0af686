// Launches of kernels, enqueued by a function of the CUDA driver: its address comes from Python, so nothing of CUDA is
// linked.
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace neo {
namespace {

class KernelLaunches {
 public:
  using Launch = std::array<uintptr_t, 4>;  // configuration, function, arguments, extra

  KernelLaunches(uintptr_t enqueue, std::vector<Launch> launches)
      : enqueue_(reinterpret_cast<Enqueue>(enqueue)), launches_(std::move(launches)) {}

  int run() const {
    for (const Launch& launch : launches_) {
      if (const int code = enqueue_(launch[0], launch[1], launch[2], launch[3])) return code;
    }
    return 0;
  }

 private:
  using Enqueue = int (*)(uintptr_t, uintptr_t, uintptr_t, uintptr_t);

  Enqueue enqueue_;
  std::vector<Launch> launches_;
};

}  // namespace

void bind_kernel_launches(nanobind::module_& module) {
  namespace nb = nanobind;
  using namespace nb::literals;
  nb::class_<KernelLaunches>(module, "KernelLaunches")
      .def(nb::init<uintptr_t, std::vector<KernelLaunches::Launch>>(), "enqueue"_a, "launches"_a)
      .def("run", &KernelLaunches::run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace neo
