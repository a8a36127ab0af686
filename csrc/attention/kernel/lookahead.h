// What is asked for while a chunk is attended. For the files of one instruction set only: all is local to the file that
// includes it.
#pragma once

#include <numeric>

#include "attention/kernel/attend.h"

namespace neo {
namespace {

// The tiles ahead of a chunk's tiles, asked for line by line. Taken apart into K or V of 16 tokens they are eight
// memory pages or so, and the lines come from all of these in turn: the processor's own prefetch follows each page
// apart, so it helps with all. Each page is two lines further than the one before it, as equal places in pages compete
// for one set of the cache.
//
// With `kIntoBothCaches` those lines go into the second cache, and what is used half a chunk later, this chunk's V and
// then the next one's K, into the first.
template <class Element, int kDim, bool kIntoBothCaches>
class Lookahead {
 public:
  Lookahead() = default;
  Lookahead(const Chunk<Element>& chunk, int block_size) {
    int num_parts = 0;
    for (int i = 0; i < chunk.num_tiles; ++i) {
      const char* tile = reinterpret_cast<const char*>(chunk.ahead[i]);
      for (int j = 0; j < 2 * block_size / kSmallestBlock; ++j) parts_[num_parts++] = tile + j * kPartBytes;
    }
    if (num_parts < kParts) ask_at_once(num_parts);
    if constexpr (kIntoBothCaches) plan_near(chunk, block_size);
  }

  // While bytes [first, first + kBytes) of the chunk are read.
  template <unsigned kBytes>
  void ask_beside(unsigned first) const {
    if constexpr (kBytes % kCacheLine == 0) {
      constexpr unsigned kTogether = std::gcd(kBytes, kTurn);
#pragma GCC unroll 16
      for (unsigned at = 0; at < kBytes; at += kTogether) ask<kTogether / kCacheLine>(first + at);
    } else {
      for (unsigned line = first / kCacheLine; line < (first + kBytes) / kCacheLine; ++line) ask<1>(line * kCacheLine);
    }
  }

  // `bytes`, if steps of kStep count them: tells the compiler, where that is so, whose turn it is.
  template <unsigned kStep>
  static unsigned in_turns(unsigned bytes) {
    return kStep % kTurn == 0 ? bytes / kTurn * kTurn : bytes;
  }

 private:
  static constexpr int kParts = 2 * kChunk / kSmallestBlock;
  static constexpr unsigned kPartBytes = kSmallestBlock * kDim * sizeof(Element);
  static constexpr unsigned kTurn = kParts * kCacheLine;

  // The lines whose turn it is while kCount lines from byte `first` of the chunk on are read. These are of one turn, so
  // that few instructions find them: each is one that a product cannot have.
  template <unsigned kCount>
  void ask(unsigned first) const {
    first = first / (kCount * kCacheLine) * (kCount * kCacheLine);  // it is not where a chunk is not full
    const uint64_t part = first / kCacheLine % kParts;
    const uint64_t place = first / kTurn * kCacheLine;
    [[maybe_unused]] const char* near = kIntoBothCaches ? near_[first / kPartBytes] + first % kPartBytes : nullptr;
#pragma GCC unroll 8
    for (unsigned i = 0; i < kCount; ++i) {
      const char* ahead = parts_[part + i] + (place + 2 * (part + i) * kCacheLine) % kPartBytes;
      if constexpr (kIntoBothCaches) {
        prefetch_far(ahead);
        prefetch(near + i * kCacheLine);
      } else {
        prefetch(ahead);
      }
    }
  }

  // Where a chunk is not full, what is near is asked for again: it has come.
  void plan_near(const Chunk<Element>& chunk, int block_size) {
    const int parts_of_half = block_size / kSmallestBlock;
    for (int i = 0; i < kParts; ++i) near_[i] = parts_[i];
    for (int i = 0; i < chunk.num_tiles; ++i) {
      const char* v = reinterpret_cast<const char*>(chunk.tiles[i]) + parts_of_half * kPartBytes;
      const char* k = reinterpret_cast<const char*>(chunk.near[i] ? chunk.near[i] : chunk.tiles[i]);
      for (int j = 0; j < parts_of_half; ++j) {
        near_[i * parts_of_half + j] = v + j * kPartBytes;
        near_[kParts / 2 + i * parts_of_half + j] = k + j * kPartBytes;
      }
    }
  }

  // What is left of a sequence goes by too fast for turns.
  void ask_at_once(int num_parts) {
    for (int i = 0; i < num_parts; ++i) {
      for (unsigned at = 0; at < kPartBytes; at += kCacheLine) prefetch(parts_[i] + at);
    }
    for (int i = num_parts; i < kParts; ++i) parts_[i] = parts_[0];
  }

  const char* parts_[kParts];
  const char* near_[kIntoBothCaches ? kParts : 1];
};

}  // namespace
}  // namespace neo
