// Calls of the CUDA driver, made without Python in between. The addresses of its functions come from Python, so nothing
// of CUDA is linked.
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace neo {
namespace {

class DriverCalls {
 public:
  using Call = std::array<uint64_t, 5>;       // the function and its arguments, then zeros, which it does not look at
  using Word = std::pair<uintptr_t, size_t>;  // its address, and which number it moves by
  using Argument = std::tuple<size_t, size_t, size_t>;  // its call, which of the call's, and the number

  DriverCalls(std::vector<Call> calls, const std::vector<Word>& words, const std::vector<Argument>& arguments)
      : calls_(std::move(calls)) {
    for (const auto& [word, number] : words) add(reinterpret_cast<void*>(word), number);
    for (const auto& [call, argument, number] : arguments) add(&calls_.at(call).at(1 + argument), number);
  }
  DriverCalls(const DriverCalls&) = delete;
  DriverCalls& operator=(const DriverCalls&) = delete;

  int run(const std::vector<int64_t>& numbers) {
    if (numbers.size() < num_numbers_) {
      throw std::invalid_argument("got " + std::to_string(numbers.size()) + " numbers to move by; expected at least " +
                                  std::to_string(num_numbers_));
    }
    for (const Moving& moving : moving_) {
      const uint64_t value = moving.first + static_cast<uint64_t>(numbers[moving.number]);
      std::memcpy(moving.word, &value, sizeof(value));
    }
    for (const auto& [function, first, second, third, fourth] : calls_) {
      if (const int code = reinterpret_cast<Function>(function)(first, second, third, fourth)) return code;
    }
    return 0;
  }

 private:
  using Function = int (*)(uint64_t, uint64_t, uint64_t, uint64_t);
  struct Moving {
    void* word;
    uint64_t first;  // what it held at first
    size_t number;
  };

  void add(void* word, size_t number) {
    moving_.push_back({word, 0, number});
    std::memcpy(&moving_.back().first, word, sizeof(uint64_t));
    num_numbers_ = std::max(num_numbers_, number + 1);
  }

  std::vector<Call> calls_;
  std::vector<Moving> moving_;
  size_t num_numbers_ = 0;
};

}  // namespace

void bind_driver_calls(nanobind::module_& module) {
  namespace nb = nanobind;
  using namespace nb::literals;
  nb::class_<DriverCalls>(module, "DriverCalls")
      .def(nb::init<std::vector<DriverCalls::Call>, const std::vector<DriverCalls::Word>&,
                    const std::vector<DriverCalls::Argument>&>(),
           "calls"_a, "words"_a = std::vector<DriverCalls::Word>(),
           "arguments"_a = std::vector<DriverCalls::Argument>())
      .def("run", &DriverCalls::run, "numbers"_a = std::vector<int64_t>(), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace neo
