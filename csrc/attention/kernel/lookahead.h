// Prefetching a chunk of tiles. For the files of one instruction set only: all is local to the file that includes it.
#pragma once

#include "attention/kernel/attend.h"

namespace neo {
namespace {

// The tiles to ask for while a chunk is attended, line by line. K or V of 16 tokens is a memory page or so, and the lines
// are taken from all of these in turn: the processor's own prefetch follows each page apart, so many are on their way at
// once.
class Lookahead {
 public:
  Lookahead() = default;
  Lookahead(const char* const* tiles, int num_tiles, int64_t tile_bytes, int64_t part_bytes) {
    const bool full = num_tiles * tile_bytes == kParts * part_bytes;
    int num_parts = 0;
    for (int i = 0; i < num_tiles; ++i) {
      for (int64_t at = 0; at < tile_bytes; at += part_bytes) parts_[num_parts++] = tiles[i] + at;
    }
    if (full) return;
    for (int64_t at = 0; at < part_bytes; at += kCacheLine) {
      for (int i = 0; i < num_parts; ++i) prefetch(parts_[i] + at);
    }
    for (int i = num_parts; i < kParts; ++i) parts_[i] = parts_[0];
  }

  void ask(unsigned line) const {
    prefetch(parts_[line % kParts] + static_cast<uint64_t>(line / kParts * kCacheLine));
  }

  static constexpr unsigned kParts = 2 * kChunk / kSmallestBlock;

 private:

  const char* parts_[kParts];
};

}  // namespace
}  // namespace neo
