// The order in which a share reads the KV, and prefetching along it. For the files of one instruction set only: all is
// local to the file that includes it.
#pragma once

#include "attention/share.h"

namespace neo {
namespace {

constexpr int kCacheLine = 64;

// How far ahead of its use the KV is asked for. Measured: docs/log.md.
#ifndef NEO_PREFETCH_BYTES
#define NEO_PREFETCH_BYTES 65536
#define NEO_PREFETCH_LOCALITY 2
#endif

// The (block, kv head) tiles of a share, in the order of attention.
class TileWalk {
 public:
  TileWalk(const Share& share, int64_t tile_bytes) : share_(share), tile_bytes_(tile_bytes) { enter(); }

  // Address of the next tile; past the last one, the last one again.
  const char* next() {
    if (block_ == stop_block_ && item_ + 1 < share_.num_items) {
      ++item_;
      enter();
    }
    if (block_ == stop_block_) return last_;
    const Geometry& g = share_.lap->geometry;
    const int64_t tile = static_cast<int64_t>(*block_++) * g.num_kv_heads + share_.items[item_].kv_head;
    return last_ = static_cast<const char*>(share_.memory->kv) + tile * tile_bytes_;
  }

 private:
  void enter() {
    const Item& item = share_.items[item_];
    const int32_t block_size = share_.lap->geometry.block_size;
    const int32_t* blocks = share_.lap->block_ids + share_.lap->block_start[item.row];
    block_ = blocks + item.first_token / block_size;
    stop_block_ = blocks + (item.stop_token + block_size - 1) / block_size;
  }

  const Share& share_;
  int64_t tile_bytes_;
  int32_t item_ = 0;
  const int32_t* block_;
  const int32_t* stop_block_;
  const char* last_ = nullptr;
};

// Asks for the tile some way ahead, line by line, as steadily as the current tile is read. In bursts the line fill
// buffers run full in one moment and empty in the next.
class Prefetch {
 public:
  Prefetch(const Share& share, int64_t tile_bytes) : walk_(share, tile_bytes), tile_bytes_(tile_bytes) {
    const int64_t tiles_ahead = (NEO_PREFETCH_BYTES + tile_bytes - 1) / tile_bytes;
    for (int64_t i = 0; i < tiles_ahead; ++i) {
      start_tile();
      finish_tile();
    }
  }

  void start_tile() {
    next_ = walk_.next();
    stop_ = next_ + tile_bytes_;
  }

  // To be called where `kLines` lines of the current tile are read.
  template <int kLines>
  void step() {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next_ + i * kCacheLine, 0, NEO_PREFETCH_LOCALITY);
    next_ += kLines * kCacheLine;
  }

  // Asks for what a tile that is not full left out.
  void finish_tile() {
    for (; next_ < stop_; next_ += kCacheLine) __builtin_prefetch(next_, 0, NEO_PREFETCH_LOCALITY);
  }

 private:
  TileWalk walk_;
  int64_t tile_bytes_;
  const char* next_ = nullptr;
  const char* stop_ = nullptr;
};

// Stands in for Prefetch where a tile is read again for further heads.
struct NoPrefetch {
  template <int kLines>
  void step() {}
};

}  // namespace
}  // namespace neo
