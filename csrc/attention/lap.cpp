#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "attention/share.h"
#include "attention/split.h"
#include "base/cpu.h"
#include "base/decimal.h"

namespace neo {

namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& value, const std::string& expected) {
  throw std::invalid_argument(name + " is " + value + "; expected " + expected);
}

[[noreturn]] void refuse(const std::string& name, int64_t value, const std::string& expected) {
  refuse(name, std::to_string(value), expected);
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

// K and V of one token and kv head.
int64_t token_bytes(const Geometry& g) { return 2LL * g.head_dim * (g.dtype == DType::kF32 ? 4 : 2); }

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
  const int64_t head_floats = 2 * (g.head_dim + 32) + 2 * 128 + 2 * 16;
  const int64_t tile_floats = 2LL * g.block_size * g.head_dim + 32 * 16;
  return (heads * head_floats + tile_floats + 16 * 16) * static_cast<int64_t>(sizeof(float));
}

// The items of one thread that nobody has claimed yet, [next, stop) of its list. The owner takes from the front, others
// from the back. A range of an earlier round, finished or not, stands for all items, so that nobody has to reset it.
class alignas(64) Unclaimed {
 public:
  void set_size(int32_t num_items) { num_items_ = static_cast<uint64_t>(num_items); }

  int count(uint16_t round) const { return size(current(range_.load(std::memory_order_relaxed), round)); }

  // Index of the item, or -1.
  int claim_first(uint16_t round) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t now = current(range, round);
      if (size(now) == 0) return -1;
      if (range_.compare_exchange_weak(range, now + kNext, std::memory_order_relaxed)) return next(now);
    }
  }
  int claim_last(uint16_t round) {
    uint64_t range = range_.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t now = current(range, round);
      if (size(now) == 0) return -1;
      if (range_.compare_exchange_weak(range, now - 1, std::memory_order_relaxed)) return stop(now) - 1;
    }
  }

 private:
  // A range: from the top 16 bits of the round, 24 of `next` and 24 of `stop`.
  static constexpr int kIndexBits = 24;
  static constexpr uint64_t kNext = uint64_t{1} << kIndexBits;

  static int stop(uint64_t range) { return static_cast<int>(range & (kNext - 1)); }
  static int next(uint64_t range) { return stop(range >> kIndexBits); }
  static int size(uint64_t range) { return stop(range) - next(range); }

  uint64_t current(uint64_t range, uint16_t round) const {
    const int shift = 2 * kIndexBits;
    return range >> shift == round ? range : uint64_t{round} << shift | num_items_;
  }

  std::atomic<uint64_t> range_{0};
  uint64_t num_items_ = 0;
};

// Partial results of one (row, kv head) that are not there yet.
struct alignas(64) OpenSlots {
  std::atomic<int32_t> count;
};

struct Lap::State {
  LapShape shape;  // its arrays are the three vectors below
  std::vector<int32_t> lengths;
  std::vector<int32_t> block_start;
  std::vector<int32_t> block_ids;
  AttendFunction attend;
  int num_threads;
  Split split;
  std::unique_ptr<Unclaimed[]> unclaimed;   // by thread
  std::unique_ptr<OpenSlots[]> slots_open;  // by cut
  uint16_t round = 0;                       // a layer's number, whichever layers they are
  AlignedMemory partials;
  AlignedMemory scratch;
  int64_t scratch_stride;
  int64_t tile_bytes;  // K and V of one (block, kv head)
  int32_t most_tiles_ahead;

  const Item* items_of(int thread) const { return split.items.data() + split.thread_start[thread]; }
  int32_t num_items(int thread) const { return split.thread_start[thread + 1] - split.thread_start[thread]; }

  const Item* claim(int thread);
  const Cut* finish(const Item& item);
};

// The thread's own items first, then one of the thread that has most left.
const Item* Lap::State::claim(int thread) {
  const int own = unclaimed[thread].claim_first(round);
  if (own >= 0) return items_of(thread) + own;
  while (true) {
    int slowest = 0;
    int most = 0;
    for (int i = 0; i < num_threads; ++i) {
      const int count = unclaimed[i].count(round);
      if (count <= most) continue;
      most = count;
      slowest = i;
    }
    if (most == 0) return nullptr;
    const int index = unclaimed[slowest].claim_last(round);
    if (index >= 0) return items_of(slowest) + index;
  }
}

// Whoever finishes the last item of a (row, kv head) merges its partial results.
const Cut* Lap::State::finish(const Item& item) {
  if (item.partial < 0) return nullptr;
  const int32_t index = split.cut_of_slot[item.partial];
  if (slots_open[index].count.fetch_sub(1, std::memory_order_acq_rel) > 1) return nullptr;
  slots_open[index].count.store(split.cuts[index].num_slots, std::memory_order_relaxed);
  return &split.cuts[index];
}

Lap::Lap(const LapShape& shape, int num_threads, const Policy& policy) {
  check_geometry(shape.geometry);
  if (num_threads < 1) refuse("num_threads", num_threads, "at least 1");
  if (!(shape.scale > 0)) refuse("scale", decimal(shape.scale), "more than 0");
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
  state->num_threads = num_threads;
  state->split = split_lap(shape, num_threads);
  state->unclaimed = std::make_unique<Unclaimed[]>(num_threads);
  for (int i = 0; i < num_threads; ++i) state->unclaimed[i].set_size(state->num_items(i));
  const std::vector<Cut>& cuts = state->split.cuts;
  state->slots_open = std::make_unique<OpenSlots[]>(cuts.size());
  for (size_t i = 0; i < cuts.size(); ++i) state->slots_open[i].count = cuts[i].num_slots;
  state->partials = allocate_aligned(state->split.cut_of_slot.size() * partial_floats(shape.geometry) * sizeof(float));
  state->scratch_stride = scratch_bytes(shape.geometry);
  state->scratch = allocate_aligned(state->scratch_stride * num_threads);
  state->tile_bytes = static_cast<int64_t>(shape.geometry.block_size) * token_bytes(shape.geometry);
  state->most_tiles_ahead = static_cast<int32_t>(cpu_cache_bytes() / 2 / static_cast<size_t>(state->tile_bytes));
  state_ = state.release();
}

Lap::~Lap() { delete state_; }

void Lap::attend(int thread, const LayerMemory& memory) noexcept {
  struct Context {
    State& state;
    int thread;
  } context{*state_, thread};

  Share share;
  share.lap = &state_->shape;
  share.memory = &memory;
  share.partials = static_cast<float*>(state_->partials.get());
  share.scratch = static_cast<char*>(state_->scratch.get()) + thread * state_->scratch_stride;
  share.context = &context;
  share.claim = [](void* c) { return static_cast<Context*>(c)->state.claim(static_cast<Context*>(c)->thread); };
  share.finish = [](void* c, const Item& item) { return static_cast<Context*>(c)->state.finish(item); };
  state_->attend(share);
}

void Lap::begin_layer() noexcept { ++state_->round; }

// A part is a tile. One that is not full is left out: it is small, and written to before it is read.
bool Lap::fetch_ahead(int thread, const void* kv, int part) const noexcept {
  constexpr int64_t kCacheLine = 64;
  constexpr int kRead = 0, kIntoSecondLevel = 2;
  if (part >= state_->most_tiles_ahead) return false;
  const Geometry& g = state_->shape.geometry;
  const Item* item = state_->items_of(thread);
  int32_t token = part * g.block_size;
  for (const Item* const last = item + state_->num_items(thread); item != last; ++item) {
    const int32_t num_tokens = item->stop_token - item->first_token;
    if (token < num_tokens) break;
    token -= (num_tokens + g.block_size - 1) / g.block_size * g.block_size;
  }
  if (item == state_->items_of(thread) + state_->num_items(thread)) return false;
  token += item->first_token;
  if (token + g.block_size > item->stop_token) return true;
  const int64_t block = state_->block_ids[state_->block_start[item->row] + token / g.block_size];
  const char* tile = static_cast<const char*>(kv) + (block * g.num_kv_heads + item->kv_head) * state_->tile_bytes;
  for (int64_t at = 0; at < state_->tile_bytes; at += kCacheLine)
    __builtin_prefetch(tile + at, kRead, kIntoSecondLevel);
  return true;
}

int64_t Lap::kv_bytes() const {
  const Geometry& g = state_->shape.geometry;
  int64_t tokens = 0;
  for (const int32_t length : state_->lengths) tokens += length;
  return tokens * g.num_kv_heads * token_bytes(g);
}

}  // namespace neo
