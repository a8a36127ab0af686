// The order in which the KV is read, and prefetching along it. For the files of one instruction set only: all is local
// to the file that includes it.
#pragma once

#include "attention/share.h"

namespace neo {
namespace {

constexpr int kCacheLine = 64;

// How far ahead of its use the KV is asked for, in whole tiles. Further ahead it falls out of the first cache again,
// which costs attention over few heads a quarter of its speed.
constexpr int64_t kBytesAhead = 24 * 1024;

// Volatile, or the compiler would gather the prefetches of an unrolled loop in front of it: in a burst the line fill
// buffers run full, and later they run empty.
inline void prefetch(const void* address) {
#if defined(__x86_64__)
  __asm__ volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address);
#endif
}

// K and V of one (block, kv head), of which the first tokens count; null past the end.
struct Tile {
  char* address;
  int32_t num_tokens;
};

// The tiles of some items, in the order of attention.
class TileWalk {
 public:
  TileWalk(const Share& share, const Item* first, const Item* last, int64_t tile_bytes)
      : share_(share), item_(first), last_(last), token_(first->first_token), tile_bytes_(tile_bytes) {}

  Tile next() {
    if (item_ == last_) return {nullptr, 0};
    const Geometry& g = share_.lap->geometry;
    const int32_t* blocks = share_.lap->block_ids + share_.lap->block_start[item_->row];
    const int64_t tile = static_cast<int64_t>(blocks[token_ / g.block_size]) * g.num_kv_heads + item_->kv_head;
    const int32_t left = item_->stop_token - token_;
    if (left > g.block_size) {
      token_ += g.block_size;
    } else if (++item_ != last_) {
      token_ = item_->first_token;
    }
    return {static_cast<char*>(share_.memory->kv) + tile * tile_bytes_, left < g.block_size ? left : g.block_size};
  }

 private:
  const Share& share_;
  const Item* item_;
  const Item* last_;
  int32_t token_;
  int64_t tile_bytes_;
};

// A tile to attend now, and one to ask for meanwhile: line for line, as steadily as this one is read.
struct StreamedTile {
  char* address;
  const char* ahead;
};

class TileStream {
 public:
  TileStream(const Share& share, const Item* first, const Item* last, int64_t row_bytes)
      : block_size_(share.lap->geometry.block_size),
        row_bytes_(row_bytes),
        tile_bytes_(2 * block_size_ * row_bytes),
        now_(share, first, last, tile_bytes_),
        ahead_(share, first, last, tile_bytes_) {
    const int64_t tiles_ahead = kBytesAhead / tile_bytes_;
    for (int64_t i = 0; i < (tiles_ahead < 1 ? 1 : tiles_ahead); ++i) ask(ahead_.next());
  }

  StreamedTile next() {
    const Tile now = now_.next(), ahead = ahead_.next();
    if (now.num_tokens == block_size_ && ahead.num_tokens == block_size_) return {now.address, ahead.address};
    ask(ahead);
    return {now.address, now.address};
  }

 private:
  // Asks for a whole tile at once, but for nothing that does not count.
  void ask(const Tile& tile) {
    const int64_t num_bytes = (tile.num_tokens + 1) / 2 * 2 * row_bytes_;
    for (int64_t at = 0; at < num_bytes; at += kCacheLine) prefetch(tile.address + at);
    for (int64_t at = 0; at < num_bytes; at += kCacheLine) prefetch(tile.address + tile_bytes_ / 2 + at);
  }

  int32_t block_size_;
  int64_t row_bytes_;
  int64_t tile_bytes_;
  TileWalk now_;
  TileWalk ahead_;
};

}  // namespace
}  // namespace neo
