#include "handoff/host_attention.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/instruction_set.h"

namespace neo {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;

// A lap as Python holds it. The work is shared with the tasks that are armed.
struct PlannedLap {
  const HostAttention* owner;
  std::shared_ptr<LapWork> work;
};

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("dtype is \"" + name + "\"; expected float32, bfloat16 or float16");
}

std::string describe(const AnyArray& array) {
  const char kind = "iufbc?"[std::min<int>(array.dtype().code, 5)];
  std::string text = kind + std::to_string(array.dtype().bits) + " [";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
  return text + "]";
}

std::vector<int32_t> copy_int32(const AnyArray& array, const char* name) {
  if (array.ndim() != 1 || array.dtype() != nb::dtype<int32_t>()) {
    throw std::invalid_argument(std::string(name) + " is " + describe(array) + "; expected i32 of one dimension");
  }
  const auto* data = static_cast<const int32_t*>(array.data());
  std::vector<int32_t> values(array.shape(0));
  for (size_t i = 0; i < values.size(); ++i) values[i] = data[static_cast<int64_t>(i) * array.stride(0)];
  return values;
}

// That `block_start` cuts `block_ids` into one table for each of `num_rows` rows.
void check_tables(size_t num_rows, const std::vector<int32_t>& block_start, size_t num_block_ids) {
  if (block_start.size() != num_rows + 1) {
    throw std::invalid_argument("block_start has " + std::to_string(block_start.size()) + " entries; expected " +
                                std::to_string(num_rows + 1) + ", one more than lengths");
  }
  if (block_start.front() != 0) {
    throw std::invalid_argument("block_start[0] is " + std::to_string(block_start.front()) + "; expected 0");
  }
  for (size_t row = 0; row < num_rows; ++row) {
    if (block_start[row + 1] >= block_start[row]) continue;
    throw std::invalid_argument("block_start[" + std::to_string(row + 1) + "] is " +
                                std::to_string(block_start[row + 1]) + ", less than the " +
                                std::to_string(block_start[row]) + " before it");
  }
  if (static_cast<size_t>(block_start.back()) != num_block_ids) {
    throw std::invalid_argument("block_start ends with " + std::to_string(block_start.back()) + "; block_ids has " +
                                std::to_string(num_block_ids) + " entries");
  }
}

void construct(HostAttention* attention, WorkerPool& pool, int32_t num_layers, int32_t num_blocks,
               int32_t num_query_heads, int32_t num_kv_heads, int32_t head_dim, int32_t block_size,
               const std::string& dtype, uintptr_t kv_address, float scale,
               const std::optional<std::string>& instruction_set) {
  const Geometry geometry{.num_layers = num_layers,
                          .num_blocks = num_blocks,
                          .num_query_heads = num_query_heads,
                          .num_kv_heads = num_kv_heads,
                          .head_dim = head_dim,
                          .block_size = block_size,
                          .dtype = parse_dtype(dtype)};
  const Policy& policy = instruction_set ? find_policy(*instruction_set) : chosen_policy();
  new (attention) HostAttention(pool, geometry, reinterpret_cast<std::byte*>(kv_address), scale, policy);
}

PlannedLap plan(const HostAttention& attention, const AnyArray& lengths, const AnyArray& block_start,
                const AnyArray& block_ids, uintptr_t qkv_address, uintptr_t out_address, uintptr_t lse_address) {
  const auto lengths_B = copy_int32(lengths, "lengths");
  const auto starts = copy_int32(block_start, "block_start");
  const auto ids = copy_int32(block_ids, "block_ids");
  check_tables(lengths_B.size(), starts, ids.size());
  const LapShape shape{.geometry = {},
                       .num_rows = static_cast<int32_t>(lengths_B.size()),
                       .lengths = lengths_B.data(),
                       .block_start = starts.data(),
                       .block_ids = ids.data(),
                       .scale = 0};
  const RowMemory rows{.qkv = reinterpret_cast<const void*>(qkv_address),
                       .out = reinterpret_cast<void*>(out_address),
                       .lse = reinterpret_cast<float*>(lse_address)};
  return {&attention, attention.plan(shape, rows)};
}

void check_owner(const HostAttention& attention, const PlannedLap& lap) {
  if (lap.owner == &attention) return;
  throw std::invalid_argument("the lap was planned by another HostAttention");
}

void arm(HostAttention& attention, const PlannedLap& lap, int layer, uintptr_t ready, uint32_t ready_value,
         uintptr_t done, uint32_t done_value) {
  check_owner(attention, lap);
  attention.arm(lap.work, layer, {&flag_at(ready, "ready"), ready_value}, {&flag_at(done, "done"), done_value});
}

void attend(HostAttention& attention, const PlannedLap& lap, int layer) {
  check_owner(attention, lap);
  const nb::gil_scoped_release no_gil;
  attention.attend(lap.work, layer);
}

double busy_us(const PlannedLap& lap) {
  int64_t busy_ns = 0;
  for (const LayerRun& run : lap.work->runs()) busy_ns += run.end_ns - run.start_ns;
  return static_cast<double>(busy_ns) * 1e-3;
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<2>> timeline(const PlannedLap& lap) {
  static_assert(sizeof(LayerRun) == 3 * sizeof(int64_t));
  auto* runs = new std::vector<LayerRun>(lap.work->runs());
  const nb::capsule owner(runs, [](void* data) noexcept { delete static_cast<std::vector<LayerRun>*>(data); });
  return {runs->data(), {runs->size(), 3}, owner};
}

}  // namespace

void bind_host_attention(nb::module_& module) {
  nb::class_<PlannedLap>(module, "Lap")
      .def_prop_ro("kv_bytes", [](const PlannedLap& lap) { return lap.work->kv_bytes(); })
      .def_prop_ro("busy_us", &busy_us)
      .def_prop_ro("layers_done", [](const PlannedLap& lap) { return lap.work->runs().size(); })
      .def("timeline", &timeline);

  nb::class_<HostAttention>(module, "HostAttention")
      .def("__init__", &construct, "pool"_a, nb::kw_only(), "num_layers"_a, "num_blocks"_a, "num_query_heads"_a,
           "num_kv_heads"_a, "head_dim"_a, "block_size"_a, "dtype"_a, "kv_address"_a, "scale"_a,
           "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>())
      .def("plan", &plan, "lengths"_a, "block_start"_a, "block_ids"_a, nb::kw_only(), "qkv_address"_a, "out_address"_a,
           "lse_address"_a = 0, nb::keep_alive<0, 1>())
      .def("arm", &arm, "lap"_a, "layer"_a, nb::kw_only(), "ready"_a, "ready_value"_a, "done"_a, "done_value"_a)
      .def("attend", &attend, "lap"_a, "layer"_a);
}

}  // namespace neo
