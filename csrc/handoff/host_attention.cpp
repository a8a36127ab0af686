#include "handoff/host_attention.h"

#include <algorithm>
#include <stdexcept>

namespace neo {
namespace {

size_t layer_bytes(const Geometry& geometry) {
  const size_t element_bytes = geometry.dtype == DType::kF32 ? 4 : 2;
  return element_bytes * 2 * static_cast<size_t>(geometry.num_blocks) * static_cast<size_t>(geometry.num_kv_heads) *
         static_cast<size_t>(geometry.block_size) * static_cast<size_t>(geometry.head_dim);
}

void check_at_least_one(int32_t value, const char* name) {
  if (value >= 1) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; expected at least 1");
}

void check_layer(const LapWork& lap, int layer) {
  if (layer >= 0 && layer < lap.num_layers()) return;
  throw std::invalid_argument("layer is " + std::to_string(layer) + "; expected 0 to " +
                              std::to_string(lap.num_layers() - 1));
}

}  // namespace

LapWork::LapWork(const LapShape& shape, int num_workers, const Policy& policy, std::byte* kv, const RowMemory& rows)
    : lap_(shape, num_workers, policy),
      num_rows_(shape.num_rows),
      num_layers_(shape.geometry.num_layers),
      kv_(kv),
      layer_bytes_(layer_bytes(shape.geometry)),
      rows_(rows) {
  runs_.reserve(static_cast<size_t>(num_layers_));
}

void LapWork::run(int worker, int layer) {
  lap_.attend(worker, {.kv = layer_kv(layer), .qkv = rows_.qkv, .out = rows_.out, .lse = rows_.lse});
}

bool LapWork::fetch_ahead(int worker, int layer, int part) { return lap_.fetch_ahead(worker, layer_kv(layer), part); }

void LapWork::finished(int layer, int64_t start_ns, int64_t end_ns) {
  const std::scoped_lock lock(mutex_);
  runs_.push_back({layer, start_ns, end_ns});
}

std::string LapWork::name(int layer) const {
  return "layer " + std::to_string(layer) + " of a lap of " + std::to_string(num_rows_) + " rows";
}

void LapWork::expect_run() {
  const std::scoped_lock lock(mutex_);
  if (++num_expected_ > runs_.capacity()) runs_.reserve(2 * num_expected_);
}

std::vector<LayerRun> LapWork::runs() const {
  const std::scoped_lock lock(mutex_);
  return runs_;
}

HostAttention::HostAttention(WorkerPool& pool, const Geometry& geometry, std::byte* kv, float scale,
                             const Policy& policy)
    : pool_(pool), geometry_(geometry), kv_(kv), scale_(scale), policy_(policy) {
  check_at_least_one(geometry.num_layers, "num_layers");
  check_at_least_one(geometry.num_blocks, "num_blocks");
  check_at_least_one(geometry.num_kv_heads, "num_kv_heads");
  check_at_least_one(geometry.num_query_heads, "num_query_heads");
  if (kv == nullptr) throw std::invalid_argument("kv_address is 0; expected the address of the host KV");
}

std::shared_ptr<LapWork> HostAttention::plan(LapShape shape, const RowMemory& rows) const {
  if (rows.qkv == nullptr) throw std::invalid_argument("qkv_address is 0; expected the address of the rows' q, k, v");
  if (rows.out == nullptr) throw std::invalid_argument("out_address is 0; expected the address of the output");
  shape.geometry = geometry_;
  shape.scale = scale_;
  return std::make_shared<LapWork>(shape, pool_.num_workers(), policy_, kv_, rows);
}

void HostAttention::arm(const std::shared_ptr<LapWork>& lap, int layer, FlagValue ready, FlagValue done) {
  check_layer(*lap, layer);
  lap->expect_run();
  pool_.arm({.work = lap, .step = layer, .ready = ready, .done = done});
}

void HostAttention::attend(const std::shared_ptr<LapWork>& lap, int layer) {
  check_layer(*lap, layer);
  lap->expect_run();
  pool_.run(lap, layer);
}

}  // namespace neo
