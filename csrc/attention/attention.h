// Decode attention of the host tier: the interface between the algorithm (csrc/attention) and the worker pool that
// runs it (csrc/handoff). No torch, no Python.
//
// Host KV, one layer: [num_blocks][num_kv_heads][2][block_size * head_dim], K tile then V tile of one head together.
// K is row-major, [block_size][head_dim]. V of a 2-byte type has token pairs interleaved,
// [block_size / 2][head_dim][2], so that AMX and vdpbf16ps read it as it lies; V of f32 is row-major.
#pragma once

#include <cstddef>
#include <cstdint>

namespace neo {

enum class DType : int32_t { kF32, kBF16, kF16 };

struct Geometry {
  int32_t num_layers;
  int32_t num_blocks;
  int32_t num_query_heads;
  int32_t num_kv_heads;
  int32_t head_dim;    // 64, 80, 96, 128 or 256
  int32_t block_size;  // tokens in a block: 16 or 32
  DType dtype;         // of KV, q, k, v and the output
};

// What is the same for all layers of a lap. Row b is one decoding sequence; its newest token (index lengths[b] - 1)
// comes with the lap and is appended to the KV before it is attended to.
struct LapShape {
  Geometry geometry;
  int32_t num_rows;
  const int32_t* lengths;      // [num_rows] tokens, the new one included
  const int32_t* block_start;  // [num_rows + 1] into block_ids
  const int32_t* block_ids;
  float scale;  // of the scores, more than 0; head_dim^-0.5 as a rule
};

// The memory that a lap works on at one layer.
struct LayerMemory {
  void* kv;         // this layer of the host KV
  const void* qkv;  // [num_rows][num_query_heads + 2 * num_kv_heads][head_dim], after rope
  void* out;        // [num_rows][num_query_heads][head_dim]
  float* lse;       // [num_rows][num_query_heads] natural log-sum-exp of the scaled scores, or null
};

// Work for one thread without interruption: tokens [first_token, stop_token) of one sequence, for all query heads
// that share one kv head. A (row, kv head) that is cut into several items has `partial` >= 0: the index of the item's
// slot in the lap's partial results, which are merged by log-sum-exp.
struct Item {
  int32_t row;
  int32_t kv_head;
  int32_t first_token;
  int32_t stop_token;
  int32_t partial;
};

struct Policy;  // one instruction set's tiles; chosen by name from a priority list (policy.h)

// The host rows of one lap: copied, checked and split over threads once, attended once a layer.
class Lap {
 public:
  // Throws std::invalid_argument with names and values for what does not fit: a length of 0 or past its blocks,
  // a block id out of range, an unsupported head dim, block size or group.
  Lap(const LapShape& shape, int num_threads, const Policy& policy);
  ~Lap();
  Lap(const Lap&) = delete;
  Lap& operator=(const Lap&) = delete;

  // To be called before a layer's first `attend`, when no thread is at another layer.
  void begin_layer() noexcept;

  // Thread `thread`'s share of one layer, then what others have not begun: appends the new k and v, attends, and merges
  // what it is the last to finish. No allocation, no lock. Each thread is to call this once a layer.
  void attend(int thread, const LayerMemory& memory) noexcept;

  // Asks the memory for part 0, 1, ... of the K and V that thread `thread` reads first in a layer whose KV is `kv`, as
  // much as its second-level cache should hold; whether there was such a part. Reads nothing of the layer.
  bool fetch_ahead(int thread, const void* kv, int part) const noexcept;

  // Bytes of K and V that one layer reads.
  int64_t kv_bytes() const;

 private:
  struct State;
  State* state_;
};

}  // namespace neo
