// Calls of the CUDA driver, made without Python in between. The addresses of its functions come from Python, so nothing
// of CUDA is linked.
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace neo {
namespace {

class DriverCalls {
 public:
  using Call = std::array<uint64_t, 5>;  // the function and its arguments, then zeros, which it does not look at

  DriverCalls(std::vector<Call> calls, const std::vector<uintptr_t>& moving) : calls_(std::move(calls)) {
    for (const uintptr_t word : moving) {
      words_.push_back({reinterpret_cast<void*>(word), 0});
      std::memcpy(&words_.back().address, words_.back().word, sizeof(uint64_t));
    }
  }

  int run(int64_t offset) const {
    for (const Word& word : words_) {
      const uint64_t address = word.address + static_cast<uint64_t>(offset);
      std::memcpy(word.word, &address, sizeof(address));
    }
    for (const auto& [function, first, second, third, fourth] : calls_) {
      if (const int code = reinterpret_cast<Function>(function)(first, second, third, fourth)) return code;
    }
    return 0;
  }

 private:
  using Function = int (*)(uint64_t, uint64_t, uint64_t, uint64_t);
  struct Word {
    void* word;
    uint64_t address;  // as it was at first
  };

  std::vector<Call> calls_;
  std::vector<Word> words_;
};

}  // namespace

void bind_driver_calls(nanobind::module_& module) {
  namespace nb = nanobind;
  using namespace nb::literals;
  nb::class_<DriverCalls>(module, "DriverCalls")
      .def(nb::init<std::vector<DriverCalls::Call>, const std::vector<uintptr_t>&>(), "calls"_a,
           "moving"_a = std::vector<uintptr_t>())
      .def("run", &DriverCalls::run, "offset"_a = 0, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace neo
