// The order in which the KV is read, and prefetching along it. For the files of one instruction set only: all is local
// to the file that includes it.
#pragma once

#include "attention/share.h"

namespace neo {
namespace {

constexpr int kCacheLine = 64;

// Into the first cache. Volatile, or the compiler would gather the prefetches of an unrolled loop in front of it: in a
// burst the line fill buffers run full, and later they run empty.
inline void prefetch(const void* address) {
#if defined(__x86_64__)
  __asm__ volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address);
#endif
}

// Into the second cache: from there on the way is short.
inline void prefetch_far(const void* address) {
#if defined(__x86_64__)
  __asm__ volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(address)));
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

// K and V of one (block, kv head), of which the first tokens count; null past the end.
struct Tile {
  char* address;
  int32_t num_tokens;
  const Item* item;  // that it belongs to
};

// The tiles of a share's items, in the order of attention. Each item is claimed when its first tile is wanted.
class TileWalk {
 public:
  TileWalk(const Share& share, int64_t tile_bytes) : share_(share), tile_bytes_(tile_bytes) { claim(); }

  Tile next() {
    if (item_ != nullptr && token_ >= item_->stop_token) claim();
    if (item_ == nullptr) return {nullptr, 0, nullptr};
    const Geometry& g = share_.lap->geometry;
    const int32_t* blocks = share_.lap->block_ids + share_.lap->block_start[item_->row];
    const int64_t tile = static_cast<int64_t>(blocks[token_ / g.block_size]) * g.num_kv_heads + item_->kv_head;
    const int32_t left = item_->stop_token - token_;
    token_ += g.block_size;
    return {static_cast<char*>(share_.memory->kv) + tile * tile_bytes_, left < g.block_size ? left : g.block_size,
            item_};
  }

 private:
  void claim() {
    item_ = share_.claim(share_.context);
    if (item_ != nullptr) token_ = item_->first_token;
  }

  const Share& share_;
  int64_t tile_bytes_;
  const Item* item_;
  int32_t token_ = 0;
};

// A tile to attend now, one that is near, and one to ask for meanwhile: line for line, as steadily as this one is read.
struct StreamedTile {
  char* address;
  const char* near;   // `kTokensNear` later; null if that is none, not full, or further than `ahead`
  const char* ahead;  // `tokens_ahead` later; this tile itself where there is nothing to ask for
};

// Items are claimed ahead, too, so that the memory does not rest between two of them.
class TileStream {
 public:
  static constexpr int kTokensNear = 64;

  // `tokens_ahead`, 1 to 96, in whole tiles.
  TileStream(const Share& share, int64_t row_bytes, int tokens_ahead)
      : block_size_(share.lap->geometry.block_size),
        row_bytes_(row_bytes),
        tile_bytes_(2 * block_size_ * row_bytes),
        tiles_near_(kTokensNear / block_size_),
        tiles_ahead_((tokens_ahead + block_size_ - 1) / block_size_),
        walk_(share, tile_bytes_) {
    for (int i = 0; i < tiles_ahead_; ++i) ask(upcoming_[i] = walk_.next());
  }

  // The item of the next tile; null when all were attended.
  const Item* item() const { return upcoming_[now_ % kMostTiles].item; }
  // The item that was claimed last, or null.
  const Item* last_claimed() const { return upcoming_[(now_ + tiles_ahead_ - 1) % kMostTiles].item; }

  StreamedTile next() {
    const Tile now = at(0), ahead = at(tiles_ahead_) = walk_.next();
    const Tile near = tiles_near_ <= tiles_ahead_ ? at(tiles_near_) : Tile{nullptr, 0, nullptr};
    ++now_;
    StreamedTile streamed{now.address, is_full(near) ? near.address : nullptr, ahead.address};
    if (!is_full(now) || !is_full(ahead)) {
      ask(ahead);
      streamed.ahead = now.address;
    }
    return streamed;
  }

 private:
  static constexpr int kMostTiles = 8;

  Tile& at(int later) { return upcoming_[(now_ + later) % kMostTiles]; }
  bool is_full(const Tile& tile) const { return tile.num_tokens == block_size_; }

  // Asks for a whole tile at once, but for nothing that does not count.
  void ask(const Tile& tile) const {
    const int64_t num_bytes = (tile.num_tokens + 1) / 2 * 2 * row_bytes_;
    for (int64_t at = 0; at < num_bytes; at += kCacheLine) prefetch_far(tile.address + at);
    for (int64_t at = 0; at < num_bytes; at += kCacheLine) prefetch_far(tile.address + tile_bytes_ / 2 + at);
  }

  int32_t block_size_;
  int64_t row_bytes_;
  int64_t tile_bytes_;
  int tiles_near_;
  int tiles_ahead_;
  TileWalk walk_;
  Tile upcoming_[kMostTiles];  // those from now_ to now_ + tiles_ahead_, modulo the size
  unsigned now_ = 0;
};

}  // namespace
}  // namespace neo
