#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention/merge.h"
#include "attention/share.h"
#include "attention/split.h"

namespace neo {

namespace {

[[noreturn]] void refuse(const std::string& name, int64_t value, const std::string& expected) {
  throw std::invalid_argument(name + " is " + std::to_string(value) + "; expected " + expected);
}

std::string indexed(const char* name, int64_t index) { return std::string(name) + "[" + std::to_string(index) + "]"; }

void check_geometry(const Geometry& g) {
  if (g.num_layers < 1) refuse("num_layers", g.num_layers, "at least 1");
  if (g.num_blocks < 1) refuse("num_blocks", g.num_blocks, "at least 1");
  if (g.block_size != 16 && g.block_size != 32) refuse("block_size", g.block_size, "16 or 32");
  if (g.num_kv_heads < 1) refuse("num_kv_heads", g.num_kv_heads, "at least 1");
  if (g.num_query_heads < 1 || g.num_query_heads % g.num_kv_heads != 0) {
    refuse("num_query_heads", g.num_query_heads, "a multiple of num_kv_heads, " + std::to_string(g.num_kv_heads));
  }
}

void check_rows(const LapShape& s) {
  if (s.num_rows < 0) refuse("num_rows", s.num_rows, "0 or more");
  for (int b = 0; b < s.num_rows; ++b) {
    const int64_t first = s.block_start[b], stop = s.block_start[b + 1];
    if (first < 0 || stop < first) refuse(indexed("block_start", b + 1), stop, "at least block_start before it");
    const int64_t room = (stop - first) * s.geometry.block_size;
    if (s.lengths[b] < 1 || s.lengths[b] > room) {
      refuse(indexed("lengths", b), s.lengths[b], "1 to " + std::to_string(room) + ", what its blocks hold");
    }
    for (int64_t i = first; i < stop; ++i) {
      if (s.block_ids[i] < 0 || s.block_ids[i] >= s.geometry.num_blocks) {
        refuse(indexed("block_ids", i), s.block_ids[i], "0 to " + std::to_string(s.geometry.num_blocks - 1));
      }
    }
  }
}

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
using AlignedMemory = std::unique_ptr<void, FreeAligned>;

AlignedMemory allocate_aligned(size_t num_bytes) {
  constexpr size_t kAlignment = 64;
  void* memory =
      std::aligned_alloc(kAlignment, (std::max<size_t>(num_bytes, 1) + kAlignment - 1) / kAlignment * kAlignment);
  if (!memory) throw std::bad_alloc();
  return AlignedMemory(memory);
}

}  // namespace

int64_t partial_floats(const Geometry& g) {
  const int64_t group = g.num_query_heads / g.num_kv_heads;
  const int64_t used = group * g.head_dim + 2 * group;
  return (used + 15) / 16 * 16;
}

// Upper bound of what any policy's tiles take, for heads in runs of up to 16 and vectors of up to 16 floats.
int64_t scratch_bytes(const Geometry& g) {
  const int64_t heads = g.num_query_heads / g.num_kv_heads + 15;
  const int64_t head_floats = 2 * (g.head_dim + 32) + 2 * 32 + 2 * 16;
  const int64_t tile_floats = 2LL * g.block_size * g.head_dim + 16 * 32;
  return (heads * head_floats + tile_floats + 16 * 16) * static_cast<int64_t>(sizeof(float));
}

struct Lap::State {
  LapShape shape;  // its arrays are the three vectors below
  std::vector<int32_t> lengths;
  std::vector<int32_t> block_start;
  std::vector<int32_t> block_ids;
  AttendFunction attend;
  Split split;
  std::unique_ptr<std::atomic<int32_t>[]> slots_open;  // by cut: partial results that are not there yet
  AlignedMemory partials;
  AlignedMemory scratch;
  int64_t scratch_stride;
};

Lap::Lap(const LapShape& shape, int num_threads, const Policy& policy) {
  check_geometry(shape.geometry);
  if (num_threads < 1) refuse("num_threads", num_threads, "at least 1");
  check_rows(shape);
  const AttendFunction attend = policy.find(shape.geometry.dtype, shape.geometry.head_dim);
  if (!attend) refuse("head_dim", shape.geometry.head_dim, "64, 80, 96, 128 or 256");

  auto state = std::make_unique<State>();
  state->lengths.assign(shape.lengths, shape.lengths + shape.num_rows);
  state->block_start.assign(shape.block_start, shape.block_start + shape.num_rows + 1);
  state->block_ids.assign(shape.block_ids, shape.block_ids + state->block_start.back());
  state->shape = shape;
  state->shape.lengths = state->lengths.data();
  state->shape.block_start = state->block_start.data();
  state->shape.block_ids = state->block_ids.data();
  state->attend = attend;
  state->split = split_lap(shape, num_threads);
  const std::vector<Cut>& cuts = state->split.cuts;
  state->slots_open = std::make_unique<std::atomic<int32_t>[]>(cuts.size());
  for (size_t i = 0; i < cuts.size(); ++i) state->slots_open[i] = cuts[i].num_slots;
  state->partials = allocate_aligned(state->split.cut_of_slot.size() * partial_floats(shape.geometry) * sizeof(float));
  state->scratch_stride = scratch_bytes(shape.geometry);
  state->scratch = allocate_aligned(state->scratch_stride * num_threads);
  state_ = state.release();
}

Lap::~Lap() { delete state_; }

void Lap::attend(int thread, const LayerMemory& memory) noexcept {
  State& s = *state_;
  const Item* first = s.split.items.data() + s.split.thread_start[thread];
  const Item* last = s.split.items.data() + s.split.thread_start[thread + 1];
  if (first == last) return;
  float* partials = static_cast<float*>(s.partials.get());
  s.attend({&s.shape, &memory, first, static_cast<int32_t>(last - first), partials,
            static_cast<char*>(s.scratch.get()) + thread * s.scratch_stride});
  for (const Item* item = first; item != last; ++item) {
    if (item->partial < 0) continue;
    const int32_t index = s.split.cut_of_slot[item->partial];
    if (s.slots_open[index].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    const Cut& cut = s.split.cuts[index];
    s.slots_open[index].store(cut.num_slots, std::memory_order_relaxed);
    merge_partials(s.shape, memory, cut, partials);
  }
}

int64_t Lap::kv_bytes() const {
  const Geometry& g = state_->shape.geometry;
  int64_t tokens = 0;
  for (const int32_t length : state_->lengths) tokens += length;
  return tokens * g.num_kv_heads * 2 * g.head_dim * (g.dtype == DType::kF32 ? 4 : 2);
}

}  // namespace neo
