// Decode attention over one share: online softmax, one pass over K and V, written once for all instruction sets.
// `Tiles` attends to a chunk of tokens with all heads that share them. For the files of one instruction set only: all
// is local to the file that includes it.
#pragma once

#include "attention/kernel/elements.h"
#include "attention/kernel/stream.h"
#include "attention/share.h"

namespace neo {
namespace {

constexpr int kChunk = TileStream::kTokensNear;  // tokens between two looks at the running maximum
constexpr int kSmallestBlock = 16;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr float kLowest = -3.0e38f;  // below any score; not infinity, so that differences stay numbers

// Writes the newest token's K and V, which came with the lap, to its place in the tile. Its pair partner is zeroed: the
// products read pairs, and what an unwritten place holds may not be a number.
template <class Element, int kDim>
void append_token(const Element* key, const Element* value, Element* tile, int block_size, int token) {
  Element* k = tile + token * kDim;
  Element* v = tile + block_size * kDim;
  for (int d = 0; d < kDim; ++d) k[d] = key[d];
  if constexpr (kPairedV<Element>) {
    Element* pairs = v + token / 2 * 2 * kDim;
    for (int d = 0; d < kDim; ++d) {
      pairs[2 * d + token % 2] = value[d];
      if (token % 2 == 0) pairs[2 * d + 1] = Element{};
    }
  } else {
    for (int d = 0; d < kDim; ++d) v[token * kDim + d] = value[d];
  }
}

// Tiles that are attended together; see StreamedTile.
template <class Element>
struct Chunk {
  int num_tokens;
  int num_tiles;
  const Element* tiles[kChunk / kSmallestBlock];
  const Element* near[kChunk / kSmallestBlock];
  const Element* ahead[kChunk / kSmallestBlock];
};

// Output and log-sum-exp of one head, from its weighted values, its maximum and its sum of weights.
template <class Tiles>
void write_head(const Share& share, int row, int query_head, const float* values, float max, float sum) {
  using Simd = typename Tiles::Simd;
  constexpr int kDim = Tiles::kDim;
  const int64_t at = static_cast<int64_t>(row) * share.lap->geometry.num_query_heads + query_head;
  typename Tiles::Element* out = static_cast<typename Tiles::Element*>(share.memory->out) + at * kDim;
  const typename Simd::Vec factor = Simd::broadcast(1.0f / sum);
  for (int d = 0; d < kDim; d += Simd::kWidth) Simd::store(out + d, Simd::mul(Simd::load(values + d), factor));
  if (share.memory->lse) share.memory->lse[at] = (max + __builtin_log2f(sum)) * kLn2;
}

// The result of an item, or its partial result.
template <class Tiles>
void finish_item(const Tiles& tiles, const Share& share, const Item& item, int group) {
  using Simd = typename Tiles::Simd;
  constexpr int kDim = Tiles::kDim;
  float* slot = item.partial < 0 ? nullptr : share.partials + item.partial * partial_floats(share.lap->geometry);
  for (int h = 0; h < group; ++h) {
    const float* values = tiles.values + h * kDim;
    const float max = tiles.maximum(h), sum = tiles.sum(h);
    if (!slot) {
      write_head<Tiles>(share, item.row, item.kv_head * group + h, values, max, sum);
      continue;
    }
    for (int d = 0; d < kDim; d += Simd::kWidth) Simd::store(slot + h * kDim + d, Simd::load(values + d));
    slot[group * kDim + h] = max;
    slot[group * kDim + group + h] = sum;
  }
}

// Partial results of one (row, kv head) into its output.
template <class Tiles>
void merge(const Share& share, const Cut& cut, int group) {
  using Simd = typename Tiles::Simd;
  using Vec = typename Simd::Vec;
  constexpr int kDim = Tiles::kDim;
  const int64_t stride = partial_floats(share.lap->geometry);
  const float* const first = share.partials + cut.first_slot * stride;
  const float* const last = first + cut.num_slots * stride;
  for (const float* at = first; at < last; at += kCacheLine / sizeof(float)) prefetch(at);
  for (int h = 0; h < group; ++h) {
    const int max_at = group * kDim + h, sum_at = max_at + group;
    float max = kLowest;
    for (const float* slot = first; slot != last; slot += stride) max = slot[max_at] > max ? slot[max_at] : max;
    float sums[Simd::kWidth], values[kDim] = {};
    Vec sum = Simd::zero();
    for (const float* slot = first; slot != last; slot += stride) {
      const Vec factor = Simd::exp2(Simd::broadcast(slot[max_at] - max));
      sum = Simd::fma(Simd::broadcast(slot[sum_at]), factor, sum);
      for (int d = 0; d < kDim; d += Simd::kWidth) {
        Simd::store(values + d, Simd::fma(Simd::load(slot + h * kDim + d), factor, Simd::load(values + d)));
      }
    }
    Simd::store(sums, sum);
    write_head<Tiles>(share, cut.row, cut.kv_head * group + h, values, max, sums[0]);
  }
}

// A row's q, k, v as they came with the lap.
template <class Tiles>
const typename Tiles::Element* row_of(const Share& share, const Item& item) {
  const Geometry& g = share.lap->geometry;
  return static_cast<const typename Tiles::Element*>(share.memory->qkv) +
         item.row * (g.num_query_heads + 2LL * g.num_kv_heads) * Tiles::kDim;
}

// The queries of an item that is to be attended soon.
template <class Tiles>
void ask_for_queries(const Share& share, const Item& item, int group) {
  const typename Tiles::Element* queries = row_of<Tiles>(share, item) + item.kv_head * group * Tiles::kDim;
  constexpr int kPerLine = kCacheLine / static_cast<int>(sizeof(*queries));
  for (int i = 0; i < group * Tiles::kDim; i += kPerLine) prefetch(queries + i);
}

template <class Tiles>
void attend_item(Tiles& tiles, const Share& share, const Item& item, int group, TileStream& stream) {
  using Element = typename Tiles::Element;
  constexpr int64_t kDim = Tiles::kDim;
  const LapShape& lap = *share.lap;
  const Geometry& g = lap.geometry;
  const Element* row = row_of<Tiles>(share, item);
  tiles.start_item(row + item.kv_head * group * kDim);
  for (int token = item.first_token; token < item.stop_token; token += kChunk) {
    const int left = item.stop_token - token;
    Chunk<Element> chunk;
    chunk.num_tokens = left < kChunk ? left : kChunk;
    chunk.num_tiles = (chunk.num_tokens + g.block_size - 1) / g.block_size;
    Element* tile = nullptr;
    const Item* const last_claimed = stream.last_claimed();
    for (int i = 0; i < chunk.num_tiles; ++i) {
      const StreamedTile streamed = stream.next();
      chunk.tiles[i] = tile = reinterpret_cast<Element*>(streamed.address);
      chunk.near[i] = reinterpret_cast<const Element*>(streamed.near);
      chunk.ahead[i] = reinterpret_cast<const Element*>(streamed.ahead);
    }
    if (stream.last_claimed() != nullptr && stream.last_claimed() != last_claimed) {
      ask_for_queries<Tiles>(share, *stream.last_claimed(), group);
    }
    if (left <= kChunk && item.stop_token == lap.lengths[item.row]) {
      const Element* key = row + (g.num_query_heads + item.kv_head) * kDim;
      const int place = (item.stop_token - 1) % g.block_size;
      append_token<Element, kDim>(key, key + g.num_kv_heads * kDim, tile, g.block_size, place);
    }
    tiles.attend(chunk, lap.scale * kLog2E);
  }
  finish_item(tiles, share, item, group);
  if (const Cut* cut = share.finish(share.context, item)) merge<Tiles>(share, *cut, group);
}

template <class Tiles>
void attend(const Share& share) {
  constexpr int64_t kRowBytes = Tiles::kDim * sizeof(typename Tiles::Element);
  const Geometry& g = share.lap->geometry;
  const int group = g.num_query_heads / g.num_kv_heads;
  Tiles tiles(share.scratch, group, g.block_size);
  TileStream stream(share, kRowBytes, Tiles::kTokensAhead);
  while (const Item* item = stream.item()) attend_item(tiles, share, *item, group, stream);
}

}  // namespace
}  // namespace neo
