// Decode attention over one host KV pool, run by a worker pool between two flags a layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "handoff/worker_pool.h"

namespace neo {

// Where a lap's rows lie; the same at every layer.
struct RowMemory {
  const void* qkv;
  void* out;
  float* lse;  // or null
};

struct LayerRun {
  int64_t layer;
  int64_t start_ns;
  int64_t end_ns;
};

// A lap as work for the pool: step l is layer l.
class LapWork : public Work {
 public:
  LapWork(const LapShape& shape, int num_workers, const Policy& policy, std::byte* kv, const RowMemory& rows);

  void begin(int) override { lap_.begin_layer(); }
  void run(int worker, int layer) override;
  bool fetch_ahead(int worker, int layer, int part) override;
  void finished(int layer, int64_t start_ns, int64_t end_ns) override;
  std::string name(int layer) const override;

  // Makes room to record one more run; called by who arms, because workers do not allocate.
  void expect_run();

  int num_layers() const { return num_layers_; }
  int64_t kv_bytes() const { return lap_.kv_bytes(); }
  std::vector<LayerRun> runs() const;

 private:
  std::byte* layer_kv(int layer) const { return kv_ + static_cast<size_t>(layer) * layer_bytes_; }

  Lap lap_;
  const int num_rows_;
  const int num_layers_;
  std::byte* const kv_;
  const size_t layer_bytes_;
  const RowMemory rows_;
  mutable std::mutex mutex_;
  std::vector<LayerRun> runs_;
  size_t num_expected_ = 0;
};

class HostAttention {
 public:
  // `kv`: [num_layers] times the layer of attention.h. The pool must outlive this.
  HostAttention(WorkerPool& pool, const Geometry& geometry, std::byte* kv, float scale, const Policy& policy);

  // Copies, checks and splits the host rows of one lap; `shape` without geometry and scale, which are this one's.
  std::shared_ptr<LapWork> plan(LapShape shape, const RowMemory& rows) const;

  void arm(const std::shared_ptr<LapWork>& lap, int layer, FlagValue ready, FlagValue done);
  void attend(const std::shared_ptr<LapWork>& lap, int layer);

 private:
  WorkerPool& pool_;
  const Geometry geometry_;
  std::byte* const kv_;
  const float scale_;
  const Policy& policy_;
};

}  // namespace neo
